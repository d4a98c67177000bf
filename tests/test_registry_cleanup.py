"""Clean-up: what nobody refers to goes, and nothing that is about to be referred to is ever lost."""

import contextlib
import multiprocessing
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest

from calling_ai.registry.audit import audit
from calling_ai.registry.cleanup import HOUR, clean, removable
from calling_ai.registry.versions import Registry, VersionDraft, keep_file

LONG_AGO = (1e9, 1e9)


def draft(folder: Path, content: str) -> VersionDraft:
    """Return a draft of a model that is none."""
    path = folder / f"{content}.bin"
    path.write_text(content)
    return VersionDraft("outcome", "town", path)


def test_everything_that_the_ledger_names_stays(workspace: Path) -> None:
    registry = Registry(workspace)
    for number in range(4):
        registry.register([draft(workspace, f"model {number}")], {"outcome": "champion"})
    registry.archive("outcome", "v1.0-town")
    (workspace / "release").write_text("composed")
    registry.keep_release(workspace / "release", {"outcome": registry.get("outcome")})
    (workspace / "release").write_text("composed anew")
    registry.keep_release(workspace / "release", {"outcome": registry.get("outcome")})
    keep_file(draft(workspace, "orphan").file, registry.folder)
    (registry.folder / ".unfinished.part").write_text("half")
    young = keep_file(draft(workspace, "young").file, registry.folder)
    before = {path for folder in (registry.folder, registry.releases) for path in folder.iterdir()}
    for path in before - {young}:
        os.utime(path, LONG_AGO)
    assert len(removable(registry)) == 2 and removable(registry, 2e9) == ()
    removed = clean(registry)
    assert len(removed.files) == 2 and removed.size == len("orphan") + len("half")
    assert len(before - {path for path in before if path.exists()}) == 2 and young.exists()
    assert all(check.ok for check in audit(registry)) and clean(registry).files == ()


def test_an_empty_workspace_stays_empty(workspace: Path) -> None:
    assert clean(Registry(workspace)).files == () and not (workspace / "var").exists()


def test_a_file_that_goes_while_it_is_registered_is_kept_again(workspace: Path) -> None:
    registry = Registry(workspace)

    def meanwhile(_: VersionDraft, path: Path) -> None:
        os.utime(path, LONG_AGO)  # the check took more than an hour
        assert clean(registry).files == (path.name,) and not path.exists()

    [version] = registry.register([draft(workspace, "model")], check=meanwhile)
    assert registry.load_file(version).read_text() == "model"


def _register(root: Path, worker: int, count: int) -> None:
    registry, draw = Registry(root), random.Random(worker)
    for number in range(count):
        content = f"model {draw.randrange(400)}"  # the same content comes again, as a retry brings it
        made = draft(root, f"w{worker}-{number}")
        made.file.write_text(content)
        with contextlib.suppress(
            OSError
        ):  # as a run that was killed long ago left it; the clean-ups may be at it already
            os.utime(keep_file(made.file, registry.folder), LONG_AGO)
        time.sleep(draw.uniform(0, 0.02))
        [version] = registry.register([made])
        if not registry.load_file(version).exists():
            raise SystemExit(3)


def _sweep(root: Path, stop: Any, swept: Any) -> None:
    registry, count = Registry(root), 0
    while not stop.is_set():
        count += len(clean(registry).files)
    swept.put(count)


def race(root: Path, count: int) -> int:
    """Register what was left long ago, in two processes, while two others clean up; return how many were removed."""
    context = multiprocessing.get_context("spawn")
    stop, swept = context.Event(), context.Queue()
    Registry(root).register([draft(root, "first")])
    sweepers = [context.Process(target=_sweep, args=(root, stop, swept)) for _ in range(2)]
    workers = [context.Process(target=_register, args=(root, number, count // 2)) for number in range(2)]
    for process in [*sweepers, *workers]:
        process.start()
    for process in workers:
        process.join(900)
    stop.set()
    removed = sum(swept.get(timeout=60) for _ in sweepers)
    for process in sweepers:
        process.join(60)
    registry = Registry(root)
    assert [process.exitcode for process in workers] == [0, 0]
    assert len(registry.list()) == 2 * (count // 2) + 1
    assert all(check.ok for check in audit(registry)), [check.found for check in audit(registry)]
    assert removed > 0, "the clean-ups have met what they are to meet"
    return removed


def test_b3_registrations_race_with_clean_ups(workspace: Path) -> None:
    removed = race(workspace, 60)
    print(f"60 registrations beside two clean-ups: {removed} files swept, 0 referenced lost (95 % below {3 / 60:.0%})")


@pytest.mark.long
def test_b3_a_thousand_races(workspace: Path) -> None:
    print(f"1,000 registrations beside two clean-ups: {race(workspace, 1000)} files swept, 0 referenced ones lost")


def test_the_doctor_uses_it(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from calling_ai.core.settings import settings
    from calling_ai.operate.commands import examine

    registry = Registry(workspace)
    registry.register([draft(workspace, "model")])
    left = keep_file(draft(workspace, "orphan").file, registry.folder)
    part = workspace / "var" / "runs" / ".table.part"
    part.parent.mkdir()
    part.write_text("half")
    for path in (left, part):
        os.utime(path, LONG_AGO)

    def found(fix: bool) -> dict[str, str]:
        return {check["name"]: check["found"] for check in examine(settings(), fix=fix)}

    assert found(False)["leftovers"].startswith("2 files of crashed runs; remove them with") and left.exists()
    assert found(True)["leftovers"] == "2 files of crashed runs removed" and not left.exists() and not part.exists()
    assert found(False)["leftovers"] == "nothing left behind"
    assert HOUR == 3600 and found(False)["runs"] == "every run that says so is alive"
