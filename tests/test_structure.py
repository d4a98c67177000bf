"""The house keeps its own rules: package and notebooks agree, imports point downward, notebooks can be read.

Each rule is a small function that returns what breaks it. A second group of tests plants a violation of every rule
and expects it to be found, so that none of them passes by looking at nothing.
"""

import ast
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE, NOTEBOOKS = ROOT / "calling_ai", ROOT / "nbs"
FLOORS = {
    "core": 1,
    "score": 2,
    "store": 3,
    "models": 4,
    "registry": 4,
    "world": 4,
    "experiments": 5,
    "serve": 6,
    "operate": 7,
    "cli": 8,
}
HEAVY = ["torch", "pandas", "prefect", "sklearn", "matplotlib", "scipy"]
ASSERTING = re.compile(
    r"^(assert_\w+|test_(eq|ne|close|is|fail|in|shuffled|stdout|warns|eq_type|eq_tmp)|ExceptionExpected|expect_fail)$"
)


# ---------------------------------------------------------------------------------------------------- notebooks


@dataclass(frozen=True)
class Cell:
    """A cell of a notebook."""

    kind: str
    source: str
    outputs: tuple[dict[str, Any], ...] = ()

    @property
    def directives(self) -> set[str]:
        """Return the names of the directives on top: export, hide, default_exp ..."""
        found = set()
        for line in self.source.splitlines():
            if not line.startswith("#|"):
                break
            found.add(line.removeprefix("#|").split()[0].rstrip(":"))
        return found

    @property
    def exported(self) -> bool:
        """Say whether the cell goes into the module."""
        return bool(self.directives & {"export", "exporti", "exports", "exec_doc"})


@cache
def cells(path: Path) -> tuple[Cell, ...]:
    """Return the cells of a notebook."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return tuple(
        Cell(cell["cell_type"], "".join(cell["source"]), tuple(cell.get("outputs", ()))) for cell in notebook["cells"]
    )


def all_notebooks() -> list[Path]:
    """Return every notebook of the repository."""
    return sorted(path for path in NOTEBOOKS.rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)


def libraries() -> list[Path]:
    """Return the notebooks that make a module."""
    return [path for path in all_notebooks() if any("default_exp" in cell.directives for cell in cells(path))]


def modules() -> list[Path]:
    """Return the modules of the package that notebooks make: all but the steps of the database schema."""
    found = sorted(path for path in PACKAGE.rglob("*.py") if path.name not in ("__init__.py", "_modidx.py"))
    return [path for path in found if "revisions" not in path.parts]


def name_of(path: Path) -> str:
    """Return a path relative to the root, for the list of tests."""
    return str(path.relative_to(ROOT))


def parsed(source: str) -> ast.Module:
    """Parse the source of a cell, without the magics of IPython."""
    kept = ["pass" if re.match(r"\s*[%!]", line) else line for line in source.splitlines()]
    return ast.parse("\n".join(kept))


# ------------------------------------------------------------------------------------- package equals notebooks


@cache
def check() -> ModuleType:
    """Import the script behind `make check`."""
    spec = importlib.util.spec_from_file_location("calling_ai_check", ROOT / ".ci" / "check.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_package_equals_its_notebooks() -> None:
    found = check().differences()
    assert not found, f"{found}; repair it with: make format"


def test_notebooks_are_clean() -> None:
    found = check().unclean()
    assert not found, f"{found}; repair it with: make format"


def test_the_readme_is_made_from_the_index() -> None:
    if not (NOTEBOOKS / "index.ipynb").exists():
        pytest.skip("nbs/index.ipynb does not exist yet, so README.md has no source to compare with")
    assert (ROOT / "README.md").read_text(encoding="utf-8") == check().readme(), "repair it with: make format"


def test_a_module_that_differs_is_found(tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for name in ("calling_ai", "nbs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    core = tmp_path / "calling_ai" / "core"
    with (core / "records.py").open("a", encoding="utf-8") as stream:
        stream.write("\n# by hand\n")
    (core / "leftover.py").write_text("", encoding="utf-8")
    (core / "files.py").unlink()
    found = [problem for problem in check().differences(tmp_path) if problem.startswith("calling_ai/core/")]
    assert found == [
        "calling_ai/core/files.py is missing",
        "calling_ai/core/leftover.py is made by no notebook",
        "calling_ai/core/records.py differs from its notebook",
    ]


def exports(path: Path) -> str:
    """Return the name of the module that a notebook makes."""
    lines = [line for cell in cells(path) for line in cell.source.splitlines() if line.startswith("#| default_exp")]
    assert len(lines) == 1, f"{name_of(path)} has {len(lines)} default_exp directives: it must have one"
    return lines[0].split()[2]


def test_one_notebook_one_module_of_the_same_name() -> None:
    found = {path: exports(path) for path in libraries()}
    assert len(found) >= 9
    for path, name in found.items():
        assert name == ".".join(path.relative_to(NOTEBOOKS).with_suffix("").parts), name_of(path)
    assert len(set(found.values())) == len(found), "two notebooks make one module"
    assert {".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in modules()} == set(found.values())
    for folder in {path.parent for path in modules()}:
        assert (folder / "__init__.py").is_file(), f"{name_of(folder)} is not a package"


# ---------------------------------------------------------------------------------------- imports point downward


def imported(tree: ast.AST, package: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield the full names of what a module imports, wherever in it; `package` is what relative imports start from."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*start, *(node.module.split(".") if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and "import" in ast.unparse(
            node.func
        ):  # import_module("..."), __import__("...")
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield argument.value


def area_of(name: str) -> str | None:
    """Return the area of an imported name, or nothing when it is not ours or is the package itself."""
    parts = name.split(".")
    return parts[1] if parts[0] == "calling_ai" and len(parts) > 1 and not parts[1].startswith("__") else None


def upward(tree: ast.AST, area: str, package: tuple[str, ...] = ()) -> list[str]:
    """Return the imports of a module in `area` that do not point downward."""
    found = []
    for name in imported(tree, package):
        other = area_of(name)
        if other is None or other == area:
            continue
        if other not in FLOORS:
            found.append(f"{name}: {other} is no area of the house")
        elif FLOORS[other] >= FLOORS[area]:
            found.append(f"{name}: {other} is on floor {FLOORS[other]}, {area} on floor {FLOORS[area]}")
    return found


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_imports_of_modules_point_downward(path: Path) -> None:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    assert parts[0] in FLOORS, f"{parts[0]} is no area of the house: give it a floor"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not upward(tree, parts[0], ("calling_ai", *parts[:-1]))


def test_the_package_itself_imports_nothing() -> None:
    for path in PACKAGE.rglob("__init__.py"):
        assert not list(imported(ast.parse(path.read_text(encoding="utf-8")))), name_of(path)


@pytest.mark.parametrize("path", libraries(), ids=name_of)
def test_imports_of_examples_point_downward(path: Path) -> None:
    area = path.relative_to(NOTEBOOKS).with_suffix("").parts[0]
    found = []
    for cell in cells(path):
        if cell.kind == "code" and not cell.exported:
            found += upward(parsed(cell.source), area)
    assert not found


def test_notebooks_outside_of_the_areas_are_only_those_that_may_be() -> None:
    outside = {path for path in all_notebooks() if path not in libraries()}
    for path in outside:
        parts = path.relative_to(NOTEBOOKS).parts
        assert parts[0] in ("pipelines", "studies") or parts == ("index.ipynb",), name_of(path)


# ------------------------------------------------------------------------------------------- notebooks are read


def unreadable(found: tuple[Cell, ...]) -> list[str]:
    """Return what a library notebook lacks to be read as a text."""
    problems = []
    if len(found) < 4:
        return ["it has fewer than four cells"]
    if found[0].kind != "code" or not re.fullmatch(r"#\| default_exp [\w.]+", found[0].source.strip()):
        problems.append("cell 0 is not default_exp alone")
    if found[1].kind != "markdown" or not re.fullmatch(r"# \S[^\n]*\n\n> \S[^\n]*", found[1].source.strip()):
        problems.append("cell 1 is not a title and one summary sentence")
    prose = found[2].source.partition("\n")[2].strip()
    if found[2].kind != "markdown" or "export" not in found[2].directives or len(prose.split()) < 20:
        problems.append("cell 2 is not an exported paragraph")
    share = sum(cell.kind == "markdown" for cell in found) / len(found)
    if share < 0.3:
        problems.append(f"only {share:.0%} of the cells are prose")
    for before, cell in zip(found, found[1:]):
        defines = cell.kind == "code" and cell.exported and definitions(cell.source)
        if defines and before.kind == "code" and not before.exported:
            problems.append(f"no prose before the definition of {', '.join(definitions(cell.source))}")
    if found[-1].kind == "code" and found[-1].exported:
        problems.append("the last cell is exported")
    return problems


def definitions(source: str) -> list[str]:
    """Return the names of the functions and classes that a cell defines."""
    return [node.name for node in parsed(source).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]


@pytest.mark.parametrize("path", libraries(), ids=name_of)
def test_a_library_notebook_is_a_text(path: Path) -> None:
    assert not unreadable(cells(path))


def asserts(tree: ast.AST) -> bool:
    """Say whether a piece of code asserts anything."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            return True
        if isinstance(node, ast.Call):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if ASSERTING.match(function):
                return True
    return False


def names_in(tree: ast.AST) -> set[str]:
    """Return all names that a piece of code uses."""
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return used | {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def public(tree: ast.Module) -> list[ast.FunctionDef | ast.ClassDef]:
    """Return the functions and classes that a module offers in `__all__`."""
    offered: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            offered = set(ast.literal_eval(node.value))
    return [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in offered]


def without_example(tree: ast.Module, found: tuple[Cell, ...]) -> list[str]:
    """Return the public names of a module that no asserting example of its notebook uses."""
    shown: set[str] = set()
    for cell in found:
        if cell.kind == "code" and not cell.exported:
            code = parsed(cell.source)
            if asserts(code):
                shown |= names_in(code)
    return [node.name for node in public(tree) if node.name not in shown]


@pytest.mark.parametrize("path", libraries(), ids=name_of)
def test_every_exported_name_has_an_asserting_example(path: Path) -> None:
    module = PACKAGE / path.relative_to(NOTEBOOKS).with_suffix(".py")
    found = without_example(ast.parse(module.read_text(encoding="utf-8")), cells(path))
    assert not found, f"no example that asserts uses {', '.join(found)}"


# ---------------------------------------------------------------------------------------------- names and types


def undocumented(tree: ast.Module) -> list[str]:
    """Return what the public definitions of a module lack: docstrings, types, a name that pytest leaves alone."""
    problems = []
    for node in public(tree):
        if node.name.lower().startswith("test"):
            problems.append(f"{node.name} starts with test")
        functions = [node] if isinstance(node, ast.FunctionDef) else []
        documented: list[Any] = [node]
        if isinstance(node, ast.ClassDef):
            functions = [part for part in node.body if isinstance(part, ast.FunctionDef)]
            documented += [part for part in functions if not part.name.startswith("_")]
        problems += [f"{part.name} has no docstring" for part in documented if not ast.get_docstring(part)]
        for function in functions:
            owner = "" if function is node else f"{node.name}."
            arguments = function.args
            given = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
            given += [item for item in (arguments.vararg, arguments.kwarg) if item]
            untyped = [item.arg for item in given if item.annotation is None and item.arg not in ("self", "cls")]
            problems += [f"{owner}{function.name}: {name} has no type" for name in untyped]
            if function.returns is None:
                problems.append(f"{owner}{function.name} has no return type")
    return problems


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_public_definitions_are_documented_and_typed(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "the module has no docstring"
    assert not undocumented(tree)


# -------------------------------------------------------------------------------------- no trace of the machine

# Pieces, so that this file does not match itself. What stands before the slash keeps web addresses out.
MACHINE = re.compile(r"(?<![\w.~)])/(?:" + "|".join(("work", "tmp", "root", "home")) + r")/\w[\w.\-/]*")


def tracked() -> list[Path]:
    """Return the files of the repository: those under version control and those that would be added."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True)
    if result.returncode:
        pytest.skip("this is not a git checkout, so it is unknown which files belong to it")
    names = sorted({name for name in result.stdout.decode().split("\0") if name})
    return [ROOT / name for name in names if (ROOT / name).is_file()]


def machine_paths(text: str) -> list[str]:
    """Return the absolute paths of a machine that a text carries."""
    return MACHINE.findall(text)


def test_no_file_names_a_folder_of_a_machine() -> None:
    found, seen = {}, 0
    for path in tracked():
        content = path.read_bytes()
        if b"\0" in content:
            continue
        seen += 1
        paths = machine_paths(content.decode("utf-8", errors="replace"))
        if paths:
            found[name_of(path)] = paths[:3]
    assert seen > 20 and not found


def spilled(found: tuple[Cell, ...]) -> list[str]:
    """Return what should not be in the outputs of a notebook: warnings, tracebacks, paths of a machine."""
    problems = []
    for cell in found:
        for output in cell.outputs:
            if output["output_type"] == "stream" and output["name"] == "stderr":
                problems.append(f"standard error: {''.join(output['text'])[:80]!r}")
            if output["output_type"] == "error":
                problems.append(f"an error: {output['ename']}")
            pictures = ("image/png", "image/jpeg")
            texts = [output.get("text", "")] + [
                part for kind, part in output.get("data", {}).items() if kind not in pictures
            ]
            problems += [f"a path: {path}" for text in texts for path in machine_paths("".join(text))]
    return problems


@pytest.mark.parametrize("path", all_notebooks(), ids=name_of)
def test_outputs_hold_no_warnings_errors_or_paths(path: Path) -> None:
    assert not spilled(cells(path))


# -------------------------------------------------------------------------------------------- imports are light


def loaded_by(statement: str, names: list[str]) -> list[str]:
    """Return which of `names` a fresh process has loaded after `statement`."""
    code = f"import sys\n{statement}\nprint(*[name for name in {names!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_importing_the_package_is_quick() -> None:
    def seconds(code: str) -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
        return time.perf_counter() - start

    best = min(seconds("import calling_ai") for _ in range(5))
    empty = min(seconds("pass") for _ in range(5))
    print(f"import calling_ai: {best:.3f} s, an empty process: {empty:.3f} s, ratio {best / empty:.2f}")
    assert best < 1.0, "the aim is 0.3 s; this bound leaves room for a busy machine"


@pytest.mark.parametrize("module", ["calling_ai", "calling_ai.serve.scorer", "calling_ai.cli"])
def test_the_front_doors_load_nothing_heavy(module: str) -> None:
    path = ROOT.joinpath(*module.split("."))
    if not path.is_dir() and not path.with_suffix(".py").is_file():
        pytest.skip(f"{module} does not exist yet")
    assert loaded_by(f"import {module}", HEAVY) == []


@pytest.mark.parametrize("area", ["core", "score", "registry", "serve", "cli"])
def test_light_areas_load_nothing_heavy(area: str) -> None:
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in modules()]
    chosen = [name for name in names if name.split(".")[1] == area]
    if not chosen:
        pytest.skip(f"the area {area} does not exist yet")
    assert loaded_by(f"import {', '.join(chosen)}", HEAVY) == []


# ---------------------------------------------------------------------------- each rule finds what it looks for


@pytest.mark.parametrize(
    ("source", "area", "package"),
    [
        ("from ..store.history import x", "score", ("calling_ai", "score")),
        ("from calling_ai.cli import main", "operate", ()),
        ("import calling_ai.models.training", "registry", ()),
        ("from calling_ai import world", "models", ()),
        ("from .. import serve", "core", ("calling_ai", "core")),
        ("def f():\n    from ..operate import pipeline", "serve", ("calling_ai", "serve")),
        ("if True:\n    import importlib\n    importlib.import_module('calling_ai.serve.scorer')", "store", ()),
        ("from calling_ai.nowhere import x", "cli", ()),
    ],
)
def test_an_upward_import_is_found(source: str, area: str, package: tuple[str, ...]) -> None:
    assert len(upward(ast.parse(source), area, package)) == 1


@pytest.mark.parametrize(
    ("source", "area", "package"),
    [
        ("from ..core.errors import InputError", "score", ("calling_ai", "score")),
        ("from .records import Record", "core", ("calling_ai", "core")),
        ("from . import records", "core", ("calling_ai", "core")),
        ("from calling_ai import __version__, core", "cli", ()),
        ("import calling_ai", "core", ()),
        ("from .score.policy import Policy", "cli", ("calling_ai",)),
        ("import models, registry.versions", "core", ()),
    ],
)
def test_a_downward_import_is_fine(source: str, area: str, package: tuple[str, ...]) -> None:
    assert upward(ast.parse(source), area, package) == []


PROSE = "#| export\n" + "word " * 30
GOOD = (
    Cell("code", "#| default_exp area.name"),
    Cell("markdown", "# Title\n\n> A sentence."),
    Cell("markdown", PROSE),
    Cell("code", "#| export\nimport math"),
    Cell("code", "#| hide\nfrom fastcore.test import test_eq"),
    Cell("markdown", "## Idea"),
    Cell("code", "#| export\ndef double(x: int) -> int:\n    'Double it.'\n    return 2 * x"),
    Cell("markdown", "Twice two:"),
    Cell("code", "test_eq(double(2), 4)\ndouble(2)"),
)


def replaced(index: int, cell: Cell | None) -> tuple[Cell, ...]:
    """Return the good notebook with one cell changed or removed."""
    return (*GOOD[:index], *([cell] if cell else []), *GOOD[index + 1 :])


def test_a_good_notebook_is_fine() -> None:
    assert unreadable(GOOD) == [] and spilled(GOOD) == []


@pytest.mark.parametrize(
    ("index", "cell", "problem"),
    [
        (0, Cell("code", "#| default_exp area.name\nimport math"), "cell 0"),
        (0, Cell("markdown", "# Title"), "cell 0"),
        (1, Cell("markdown", "# Title"), "cell 1"),
        (1, Cell("markdown", "# Title\n\n> A\n> B"), "cell 1"),
        (2, Cell("markdown", "word " * 30), "cell 2"),
        (2, Cell("markdown", "#| export\nshort"), "cell 2"),
        (5, None, "no prose before the definition of double"),
        (8, Cell("code", "#| export\nx = 1"), "the last cell is exported"),
    ],
)
def test_an_unreadable_notebook_is_found(index: int, cell: Cell | None, problem: str) -> None:
    assert any(problem in found for found in unreadable(replaced(index, cell)))


def test_too_little_prose_is_found() -> None:
    assert any("are prose" in found for found in unreadable(GOOD + (Cell("code", "1"),) * 10))


MODULE = ast.parse(
    "__all__ = ['double', 'Thing', 'LIMIT']\nLIMIT = 1\n" + GOOD[6].source + "\nclass Thing: pass\ndef _x(): pass"
)


@pytest.mark.parametrize(
    ("example", "missing"),
    [
        ("assert double(2) == 4; Thing()", []),
        ("test_eq(double(2), 4)\nmodule.Thing", []),
        ("with ExceptionExpected(ValueError): double(Thing)", []),
        ("np.testing.assert_allclose(double(2), Thing)", []),
        ("double(2), Thing()", ["double", "Thing"]),
        ("assert double(2) == 4", ["Thing"]),
        ("assert True  # double Thing", ["double", "Thing"]),
        ("#| export\nassert double(2) == Thing", ["double", "Thing"]),
    ],
)
def test_a_name_without_an_asserting_example_is_found(example: str, missing: list[str]) -> None:
    assert without_example(MODULE, replaced(8, Cell("code", example))) == missing


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("def f(x) -> int:\n    'Do.'", "f: x has no type"),
        ("def f(x: int):\n    'Do.'", "f has no return type"),
        ("def f(x: int, *rest, **more: int) -> int:\n    'Do.'", "f: rest has no type"),
        ("def f(x: int) -> int: return x", "f has no docstring"),
        ("class f:\n    x = 1", "f has no docstring"),
        ("class f:\n    'A thing.'\n    def go(self, x: int):\n        'Go.'", "f.go has no return type"),
        ("class f:\n    'A thing.'\n    def go(self) -> None: pass", "go has no docstring"),
        ("def test_f() -> None:\n    'Do.'", "test_f starts with test"),
    ],
)
def test_an_undocumented_definition_is_found(source: str, problem: str) -> None:
    assert undocumented(ast.parse(f"__all__ = ['f', 'test_f']\n{source}")) == [problem]


def test_traces_of_a_machine_are_found() -> None:
    slash = "/"
    for text in (
        "{0}tmp{0}x",
        "see {0}home{0}me{0}file.csv.",
        "'{0}work{0}main'",
        "sqlite:///{0}root{0}a.db",
        "({0}tmp{0}y)",
    ):
        assert len(machine_paths(text.format(slash))) == 1, text
    for text in ("https://example.com{0}home{0}page", "var{0}tmp{0}x", "~{0}work{0}x", "{0}tmp", "{0}usr{0}bin{0}env"):
        assert machine_paths(text.format(slash)) == [], text
    outputs: list[tuple[dict[str, Any], str]] = [
        ({"output_type": "stream", "name": "stderr", "text": ["a warning"]}, "standard error"),
        ({"output_type": "error", "ename": "ValueError"}, "an error"),
        ({"output_type": "stream", "name": "stdout", "text": [f"{slash}tmp{slash}x"]}, "a path"),
        ({"output_type": "execute_result", "data": {"text/plain": [f"'{slash}root{slash}x'"]}}, "a path"),
    ]
    for output, problem in outputs:
        found = spilled((Cell("code", "1", (output,)),))
        assert len(found) == 1 and found[0].startswith(problem)


def test_a_heavy_import_is_found() -> None:
    assert loaded_by("import pandas", HEAVY + ["json"]) == ["pandas", "json"]
