"""What all tests share: folders, a workspace of their own, and quiet, repeatable settings."""

import os
import shutil
import signal
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy and torch: two busy processes on two cores slow each other down
os.environ.setdefault("MPLBACKEND", "Agg")
signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # a shell that runs us in the background ignores Ctrl-C, and children inherit that

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "house",
    deadline=None,
    max_examples=50,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("house")

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("CI_SHARED") or os.environ.get("CALLING_AI_SHARED") or ROOT.parent / "shared")


@pytest.fixture(scope="session")
def root() -> Path:
    """Return the root of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of the shared reference data, or skip the test where it is absent."""
    if not (SHARED / "data").is_dir():
        pytest.skip("the shared reference data is not on this machine")
    return SHARED.resolve()


@pytest.fixture
def workspace(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a workspace of the test's own: the settings, the pipeline notebooks, and no setting from outside."""
    folder = tmp_path / "workspace"
    folder.mkdir()
    shutil.copy(root / "settings.ini", folder)
    if (root / "nbs" / "pipelines").is_dir():
        ignored = shutil.ignore_patterns(".ipynb_checkpoints")
        shutil.copytree(root / "nbs" / "pipelines", folder / "nbs" / "pipelines", ignore=ignored)
    for name in [name for name in os.environ if name.startswith("CALLING_AI_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("CALLING_AI_WORKSPACE", str(folder))
    return folder
