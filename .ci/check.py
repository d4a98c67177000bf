"""Check that the checkout is in order; with --fix, bring it in order.

Format and lint of tests, flows, benchmarks and scripts; lint of the package; types of the package; the package equals
its notebooks; README.md equals nbs/index.ipynb; notebooks are clean. Each failure names the command that repairs it.
"""

import argparse
import filecmp
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLAIN = ["tests", "flows", "benchmarks", ".ci", "calling_ai/store/revisions"]


def library_notebooks(root: Path = ROOT) -> list[Path]:
    """Return the notebooks that export a module."""
    found = sorted(path for path in (root / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)
    return [path for path in found if "#| default_exp" in path.read_text(encoding="utf-8")]


def export(root: Path) -> None:
    """Export all library notebooks below `root` into the package there."""
    from nbdev.export import nb_export

    for path in library_notebooks(root):
        nb_export(path, lib_path=root / "calling_ai")


def fresh_package(root: Path, folder: Path) -> Path:
    """Return a fresh export of the notebooks of `root`, made in `folder`.

    The export names each notebook by its relative path, so the copy has the layout of the checkout.
    """
    shutil.copytree(root / "nbs", folder / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    shutil.copy(root / "pyproject.toml", folder)
    (folder / "calling_ai").mkdir()
    export(folder)
    return folder / "calling_ai"


def by_notebook(path: Path) -> bool:
    """Say whether a notebook makes a module: all but the steps of the database schema, which are written by hand."""
    return "revisions" not in path.parts


def differences(root: Path = ROOT) -> list[str]:
    """Return what differs between the package and a fresh export of the notebooks, one sentence each."""
    with tempfile.TemporaryDirectory() as folder:
        fresh = fresh_package(root, Path(folder))
        made = {path.relative_to(fresh) for path in fresh.rglob("*.py")}
        kept = {
            path.relative_to(root / "calling_ai") for path in (root / "calling_ai").rglob("*.py") if by_notebook(path)
        }
        found = [f"calling_ai/{name} is missing" for name in sorted(made - kept)]
        found += [
            f"calling_ai/{name} is made by no notebook"
            for name in sorted(kept - made)
            if name.name not in ("__init__.py", "_modidx.py")
        ]
        found += [
            f"calling_ai/{name} differs from its notebook"
            for name in sorted(made & kept)
            if not filecmp.cmp(fresh / name, root / "calling_ai" / name, shallow=False)
        ]
        return found


def readme(root: Path = ROOT) -> str:
    """Return README.md as made from nbs/index.ipynb: prose, code and its outputs, pictures by relative path."""
    import nbformat

    notebook = nbformat.read(root / "nbs" / "index.ipynb", as_version=4)
    parts: list[str] = []
    for cell in notebook.cells:
        if cell.source.startswith("#| hide"):
            continue
        if cell.cell_type == "markdown":
            source = re.sub(r"\]\((?![a-z]+:|#)", "](nbs/", cell.source)  # the notebook lies one folder deeper
            parts.append(source.replace('src="images/', 'src="nbs/images/'))
            continue
        parts.append(f"```python\n{cell.source}\n```")
        for output in cell.outputs:
            text = output.get("text") or output.get("data", {}).get("text/markdown")
            plain = output.get("data", {}).get("text/plain")
            if output.get("data", {}).get("text/markdown"):
                parts.append("".join(text))
            elif text or plain:
                parts.append("```text\n" + "".join(text or plain).rstrip() + "\n```")
    return "<!-- Made from nbs/index.ipynb by `make format`; edit the notebook. -->\n\n" + "\n\n".join(parts) + "\n"


def unclean(root: Path = ROOT) -> list[str]:
    """Return the notebooks that carry metadata or counters which change on every run."""
    import nbformat

    found = []
    for path in sorted((root / "nbs").rglob("*.ipynb")):
        if ".ipynb_checkpoints" in path.parts:
            continue
        notebook = nbformat.read(path, as_version=4)
        dirty = any(
            set(cell.metadata) - {"tags"} or (cell.cell_type == "code" and cell.get("execution_count"))
            for cell in notebook.cells
        )
        if dirty:
            found.append(f"{path.relative_to(root)} carries cell metadata or execution counts")
    return found


def run(*command: str) -> bool:
    """Run a tool of the environment and say whether it was content."""
    return subprocess.run([sys.executable, "-m", *command], cwd=ROOT).returncode == 0


def fix() -> None:
    """Format, clean, export, and write the README."""
    run("ruff", "check", "--quiet", "--fix", *PLAIN)
    run("ruff", "format", "--quiet", *PLAIN)
    subprocess.run([str(Path(sys.executable).with_name("nbdev-clean"))], cwd=ROOT, check=True)
    with tempfile.TemporaryDirectory() as folder:  # a failing export leaves the package as it was
        fresh = fresh_package(ROOT, Path(folder))
        for path in (ROOT / "calling_ai").rglob("*.py"):
            if path.name != "__init__.py" and by_notebook(path):
                path.unlink()
        for path in fresh.rglob("*.py"):
            target = ROOT / "calling_ai" / path.relative_to(fresh)
            target.parent.mkdir(exist_ok=True)
            if path.name != "__init__.py":
                shutil.copy(path, target)
    (ROOT / "README.md").write_text(readme(), encoding="utf-8")


def main() -> int:
    """Run all checks and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fix", action="store_true", help="format, clean, export and write the README first")
    if parser.parse_args().fix:
        fix()
    problems = differences() + unclean()
    if (ROOT / "README.md").read_text(encoding="utf-8") != readme():
        problems.append("README.md differs from nbs/index.ipynb")
    for problem in problems:
        print(f"{problem}; repair it with: make format")
    good = not problems
    good &= run("ruff", "check", "--quiet", *PLAIN, "calling_ai", "nbs")
    good &= run("ruff", "format", "--quiet", "--check", *PLAIN)
    good &= run("mypy")
    shutil.rmtree(ROOT / ".mypy_cache", ignore_errors=True)
    print("all in order" if good else "not in order")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
