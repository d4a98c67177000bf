"""Every notebook that a reader opens runs from the first cell to the last."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(sys.executable).with_name("nbdev-test")


def execute(folder: Path, root: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run all notebooks below a folder, two at a time, in a fresh environment."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CALLING_AI_")}
    environment |= {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    command = [str(TOOL), "--n-workers", "2", "--do-print", *options, str(folder)]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=1800)


def ran(result: subprocess.CompletedProcess[str]) -> list[Path]:
    """Return the notebooks that ran to their end or to an error.

    Two workers share the output: their lines may follow each other without a break, and a process that a notebook
    forked may say again what its parent had not written yet.
    """
    return sorted({Path(name) for name in re.findall(r"- Completed (.+?\.ipynb)", result.stdout)})


def notebooks(root: Path) -> list[Path]:
    """Return the notebooks that must run: all but those of the pipelines, which their own tests run."""
    found = sorted((root / "nbs").rglob("*.ipynb"))
    return [path for path in found if not {".ipynb_checkpoints", "pipelines"} & set(path.parts)]


@pytest.fixture
def tool() -> None:
    """Skip where nbdev is not installed."""
    if not TOOL.exists():
        pytest.skip("nbdev is not installed here; make install brings it")


@pytest.mark.usefixtures("tool")
def test_every_notebook_runs(root: Path) -> None:
    expected = notebooks(root)
    assert len(expected) >= 9
    result = execute(root / "nbs", root, "--skip-folder-re", r"^[_.]|^pipelines$", "--timing")
    report = f"\n{result.stdout[-6000:]}\n{result.stderr[-6000:]}"
    assert result.returncode == 0, report
    assert ran(result) == expected, report


def write(path: Path, *sources: str) -> None:
    """Write a small notebook."""
    blank = {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": []}
    made = [{**blank, "id": f"cell{index}", "source": source} for index, source in enumerate(sources)]
    content = {"cells": made, "metadata": {"language_info": {"name": "python"}}, "nbformat": 4, "nbformat_minor": 5}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.usefixtures("tool")
def test_a_notebook_that_fails_is_found(root: Path, tmp_path: Path) -> None:
    write(tmp_path / "good" / "fine.ipynb", "x = 1", "assert x == 1")
    good = execute(tmp_path / "good", root)
    assert good.returncode == 0 and ran(good) == [tmp_path / "good" / "fine.ipynb"], good.stderr
    write(tmp_path / "bad" / "fine.ipynb", "x = 1")
    write(tmp_path / "bad" / "planted.ipynb", "x = 1", "assert x == 2, 'planted failure'")
    bad = execute(tmp_path / "bad", root)
    assert bad.returncode != 0 and "planted failure" in bad.stdout + bad.stderr


@pytest.mark.usefixtures("tool")
def test_an_example_that_stops_holding_is_found(root: Path, tmp_path: Path) -> None:
    """Break one expectation of a real notebook: running it must fail, so its examples are really executed."""
    text = (root / "nbs" / "core" / "errors.ipynb").read_text(encoding="utf-8")
    assert text.count("test_eq(") > 1
    broken = text.replace("import test_eq", "import test_eq, test_ne").replace("test_eq(", "test_ne(")
    (tmp_path / "errors.ipynb").write_text(broken, encoding="utf-8")
    result = execute(tmp_path, root)
    assert result.returncode != 0 and "test_ne" in result.stdout + result.stderr
