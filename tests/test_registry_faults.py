"""Disks that are full, fail or vanish at a write of register, promote, rollback and begin: done, or not begun (B1)."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from calling_ai.operate.rollout import current, example_workspace
from calling_ai.registry.audit import audit
from calling_ai.registry.versions import Registry

CHILD = """
import os, resource, signal, sys
from calling_ai.core.errors import CallingError
from calling_ai.core.settings import settings
from calling_ai.operate import rollout
from calling_ai.registry.versions import Registry, VersionDraft
root, work, limit = sys.argv[1], sys.argv[2], int(sys.argv[3])
registry, workspace = Registry(root), settings(root)
registry.list()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
try:
    if work == "register": registry.register([VersionDraft("outcome", "town", root + "/new.onnx")], actor="a test")
    elif work == "promote": registry.promote_release({"outcome": "v1.1-town"}, 0.2, "a test")
    elif work == "rollback": registry.rollback("a test", "a reason")
    elif work == "begin": rollout.begin(workspace, "v1.1-town", actor="a test")
except (CallingError, OSError) as error:
    print("refused:", " ".join(str(error).split())[:160])
    os._exit(3)
os._exit(0)
"""


def state(registry: Registry) -> tuple[object, ...]:
    versions = tuple((item.version, item.status, item.aliases) for item in registry.list())
    found = current(registry)
    return versions, registry.live().versions, registry.live().weight, found.state if found else None


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults") / "place"
    example_workspace(folder)
    from calling_ai.models.graph import export
    from calling_ai.models.networks import build, default_spec

    export(build(default_spec("outcome"), seed=7), folder / "new.onnx")
    return folder


def run(folder: Path, work: str, limit: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CHILD, str(folder), work, str(limit)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ, check=False)


def around(made: Path, work: str, folder: Path) -> tuple[Path, Path, tuple[object, ...], tuple[object, ...]]:
    """Return a place before the work and one after it, and the state of both."""
    start = shutil.copytree(made, folder / "start")
    if work == "rollback":
        Registry(start).promote_release({"outcome": "v1.1-town"}, 0.2, "a test")
    whole = shutil.copytree(start, folder / "whole")
    assert run(whole, work, 2**30).returncode == 0
    before, after = state(Registry(start)), state(Registry(whole))
    assert after != before
    return start, whole, before, after


def full_at_every_write(made: Path, work: str, folder: Path, points: int) -> tuple[int, int]:
    """Run with a disk that takes fewer and fewer bytes of a file; return how often it was refused, and done."""
    start, whole, before, after = around(made, work, folder)
    size = max(path.stat().st_size for path in whole.rglob("*") if path.is_file())
    refused = done = 0
    for number in range(points):
        copy = shutil.copytree(start, folder / f"limit-{number}")
        limit = int(size * 1.02 * number / (points - 1)) // 512 * 512
        answer = run(copy, work, limit)
        assert answer.returncode in (0, 3), answer.stderr[-1_500:]
        registry = Registry(copy)
        assert [check.name for check in audit(registry) if not check.ok] == [], (work, limit)
        assert state(registry) == (after if answer.returncode == 0 else before), (work, limit, answer.stdout)
        refused, done = refused + (answer.returncode == 3), done + (answer.returncode == 0)
        if answer.returncode == 3:  # with room again it is done
            assert run(copy, work, 2**30).returncode == 0 and state(Registry(copy)) == after
        shutil.rmtree(copy)
    return refused, done


@pytest.mark.parametrize("work", ["register", "promote", "rollback", "begin"])
def test_a_full_disk_leaves_nothing_half(made: Path, work: str, tmp_path: Path) -> None:
    refused, done = full_at_every_write(made, work, tmp_path, 6)
    print(f"{work}: refused {refused} times, done {done} times, 0 halves")
    assert refused >= 2 and done >= 1


@pytest.mark.long
@pytest.mark.parametrize("work", ["register", "promote", "rollback", "begin"])
def test_a_disk_full_at_a_hundred_points(made: Path, work: str, tmp_path: Path) -> None:
    refused, done = full_at_every_write(made, work, tmp_path, 100)
    print(f"{work}: refused {refused} times, done {done} times, 0 halves (95 % below {3 / max(1, refused):.1%})")


# ------------------------------------------------------------------------------------- every system call, by strace

CALLS = ("pwrite64", "fsync", "fdatasync", "rename", "unlink", "mkdir", "ftruncate")


def injected(folder: Path, work: str, call: str, fault: str, number: int) -> tuple[int, bool]:
    """Run with one system call that fails or kills; return the exit code, and whether it was reached."""
    log = folder.with_suffix(".strace")
    command = [
        "strace",
        "-f",
        "-qq",
        "-o",
        str(log),
        "-e",
        f"trace={call}",
        "-e",
        f"inject={call}:{fault}:when={number}",
    ]
    command += [sys.executable, "-c", CHILD, str(folder), work, str(2**30)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ, check=False)
    text = log.read_text(errors="replace")
    return done.returncode, "INJECTED" in text or "killed by SIGKILL" in text or done.returncode < 0


def every_call_fails(made: Path, work: str, folder: Path, step: int) -> dict[str, int]:
    """Fail system call 1, 2, 3 ... of each kind until a run goes through; what is left is whole each time."""
    start, _, before, after = around(made, work, folder)
    counts = {"EIO": 0, "ENOSPC": 0, "KILL": 0}
    for call in CALLS:
        for name, fault in (("EIO", "error=EIO"), ("ENOSPC", "error=ENOSPC"), ("KILL", "signal=KILL")):
            for number in range(1, 400, step if call == "pwrite64" else 1):
                copy = shutil.copytree(start, folder / f"{call}-{name}-{number}")
                code, reached = injected(copy, work, call, fault, number)
                registry = Registry(copy)
                assert [check.name for check in audit(registry) if not check.ok] == [], (call, name, number)
                found = state(registry)
                assert found in (before, after) and (code != 0 or found == after), (call, name, number, code)
                if found == before:
                    assert run(copy, work, 2**30).returncode == 0 and state(Registry(copy)) == after
                shutil.rmtree(copy)
                if not reached:
                    break
                counts[name] += 1
    return counts


@pytest.mark.long
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
@pytest.mark.parametrize("work", ["register", "promote", "rollback", "begin"])
def test_every_system_call_that_fails(made: Path, work: str, tmp_path: Path) -> None:
    counts = every_call_fails(made, work, tmp_path, 3)
    total = sum(counts.values())
    print(f"{work}: {counts}, {total} faults, 0 halves (95 % below {3 / total:.1%})")
    assert total >= 20
