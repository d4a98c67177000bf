"""Runs: once is once, whoever asks; the dead are found without a server; and what was finished is not done again."""

import datetime as dt
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from calling_ai.core.errors import InputError
from calling_ai.store.database import engine, reading
from calling_ai.store.runs import Lost, Taken, claim, digest_of, free, listed, overdue, skip
from calling_ai.store.schema import run_steps


@pytest.fixture
def database(database_url: str) -> Any:
    """Return a fresh database of each kind."""
    made = engine(database_url)
    yield made
    made.dispose()


def test_once_is_once(database: Any) -> None:
    with claim(database, "retrain", "2026-03-02", reason="weekly") as held:
        with pytest.raises(Taken, match="is under way") as told, claim(database, "retrain", "2026-03-02"):
            pass
        assert told.value.run == held.run and told.value.exit_code == 3
        with claim(database, "retrain", "2026-03-03"), claim(database, "monitor", "2026-03-02"):
            pass  # another period and another kind are other runs
        held.result = {"version": "v1.1-town", "auc": 0.79}
    with pytest.raises(Taken, match="is done since") as told, claim(database, "retrain", "2026-03-02"):
        pass
    run = told.value.run
    assert (run.state, run.attempt, run.reason, run.result) == (
        "done",
        1,
        "weekly",
        {"version": "v1.1-town", "auc": 0.79},
    )
    assert run.finished_at is not None and run.started_at <= run.finished_at


@pytest.mark.parametrize(
    "error, state, reason",
    [
        (ValueError("no  rows\nat all"), "failed", "no rows at all"),
        (KeyboardInterrupt(), "interrupted", "KeyboardInterrupt"),
        (SystemExit(143), "interrupted", "143"),
    ],
)
def test_what_goes_wrong_is_written_down_and_may_be_tried_again(
    database: Any, error: BaseException, state: str, reason: str
) -> None:
    with pytest.raises(type(error)), claim(database, "retrain"):
        raise error
    [run] = listed(database)
    assert (run.key, run.state, run.reason, run.attempt) == ("retrain", state, reason, 1)
    with claim(database, "retrain"):
        pass
    assert (listed(database)[0].state, listed(database)[0].attempt) == ("done", 2)


def test_steps_are_taken_over_when_nothing_has_changed(database: Any, tmp_path: Path) -> None:
    done: list[str] = []
    table = tmp_path / "table.csv"
    table.write_text("a,b\n1,2\n")

    def make(name: str) -> Callable[[], dict[str, Any]]:
        def work() -> dict[str, Any]:
            done.append(name)
            (tmp_path / f"{name}.out").write_text(f"result of {name}")
            return {"file": str(tmp_path / f"{name}.out")}

        return work

    def attempt(seed: int, fail: bool = True) -> list[bool]:
        there = []
        try:
            with claim(database, "pipeline", "p") as held:
                for name, inputs in (("snapshot", {"table": table}), ("train", {"seed": seed, "table": table})):
                    record, known = held.step(name, inputs, make(name), lambda record: [Path(record["file"])])
                    assert Path(record["file"]).read_text() == f"result of {name}"
                    there.append(known)
                if fail:
                    raise ZeroDivisionError
        except ZeroDivisionError:
            pass
        return there

    assert attempt(1) == [False, False]
    assert attempt(1) == [True, True]
    assert attempt(2) == [True, False], "other parameters"
    (tmp_path / "train.out").write_text("something else")
    assert attempt(2) == [True, False], "its file was changed"
    (tmp_path / "snapshot.out").unlink()
    assert attempt(2) == [False, True], "its file is gone"
    table.write_text("a,b\n1,3\n")
    assert attempt(2, fail=False) == [False, False], "what went in is another"
    assert done == ["snapshot", "train", "train", "train", "snapshot", "snapshot", "train"]
    with reading(database) as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(run_steps)) == 2


def test_the_digest_is_that_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    (tmp_path / "b").write_text("x")
    assert digest_of({"p": tmp_path / "a", "n": 1}) == digest_of({"n": 1, "p": tmp_path / "b"})
    seen = {
        digest_of(inputs)
        for inputs in ({}, {"n": 1}, {"n": 1.5}, {"n": "1"}, {"n": None}, {"m": 1}, {"p": tmp_path / "a"})
    }
    assert len(seen) == 7


def test_wrong_questions(database: Any) -> None:
    with pytest.raises(InputError, match="kind is empty"), claim(database, ""):
        pass
    with pytest.raises(InputError, match="lease_seconds is 0"), claim(database, "retrain", lease_seconds=0):
        pass
    with claim(database, "retrain") as held, pytest.raises(InputError, match="state is 'well'"):
        held.end("well")


def test_what_is_skipped_is_not_done(database: Any) -> None:
    assert skip(database, "retrain", "2026-02-23", "the machine slept")
    with pytest.raises(Taken, match="is skipped since"), claim(database, "retrain", "2026-02-23"):
        pass
    with claim(database, "retrain", "2026-03-02"):
        assert not skip(database, "retrain", "2026-03-02", "too late")
    assert [run.state for run in listed(database, "retrain")] == ["done", "skipped"]


_WORKER = """
import sys, time
from calling_ai.store.database import engine
from calling_ai.store.runs import claim
with claim(engine(sys.argv[1]), "retrain", "p", lease_seconds=float(sys.argv[2])) as held:
    print("begun", held.run.attempt, flush=True)
    time.sleep(float(sys.argv[3]))
"""


def worker(url: str, lease: float, seconds: float) -> subprocess.Popen[str]:
    """Start a process that claims the run and works for some time."""
    child = subprocess.Popen(
        [sys.executable, "-c", _WORKER, url, str(lease), str(seconds)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None and child.stdout.readline().startswith("begun")
    return child


def test_b11_the_dead_are_found_and_their_work_is_taken_over(database: Any, database_url: str) -> None:
    child = worker(database_url, 1.0, 60)
    time.sleep(1.5)
    assert overdue(database) == [], "it lives, and says so"
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    killed = time.monotonic()
    while not free(database):
        assert time.monotonic() - killed < 90
        time.sleep(0.05)
    took = time.monotonic() - killed
    print(f"{database.dialect.name}: a killed run is seen {took:.1f} s later with a lease of 1 s; a workspace has 60")
    [run] = listed(database)
    assert run.state == "crashed" and "no sign of life from" in str(run.reason)
    child = worker(database_url, 1.0, 0)
    assert child.wait(30) == 0
    assert (listed(database)[0].state, listed(database)[0].attempt) == ("done", 2)


def test_a_process_that_slept_is_told_before_it_writes(database: Any, database_url: str) -> None:
    written: list[str] = []
    with pytest.raises(Lost, match="is not ours any more: it is done, attempt 2"):  # noqa: SIM117
        with claim(database, "retrain", "p", lease_seconds=0.2) as held:
            held._stop.set()  # as if the whole process stood still
            time.sleep(0.4)
            assert worker(database_url, 5, 0).wait(30) == 0
            held.step("train", {}, lambda: written.append("!") or {})
    assert written == [] and listed(database)[0].attempt == 2
    with pytest.raises(Lost), claim(database, "other", lease_seconds=0.2) as held:
        held._stop.set()
        time.sleep(0.4)
        free(database)
    assert [run.state for run in listed(database, "other")] == ["crashed"], "its end came too late"


def _ask(url: str, worker: int, periods: int, answers: Any) -> None:
    database, draw, mine = engine(url), random.Random(worker), []
    for _ in range(4):
        for period in draw.sample(range(periods), periods):
            try:
                with claim(database, "collect", str(period)) as held:
                    held.step("rows", {"period": period}, lambda: {"by": worker})
                    time.sleep(draw.uniform(0, 0.005))
                    mine.append(period)
            except Taken:
                pass
    answers.put(mine)


def test_asked_by_many_at_once_each_is_done_once(database: Any, database_url: str) -> None:
    context = multiprocessing.get_context("spawn")
    answers, periods = context.Queue(), 30
    workers = [context.Process(target=_ask, args=(database_url, number, periods, answers)) for number in range(4)]
    for process in workers:
        process.start()
    done = sorted(period for _ in workers for period in answers.get(timeout=120))
    for process in workers:
        process.join(30)
    assert done == list(range(periods)) and {(run.state, run.attempt) for run in listed(database)} == {("done", 1)}
    print(f"{database.dialect.name}: {periods} periods asked {4 * 4 * periods} times by 4 processes: each done once")


def test_times_are_those_of_the_database(database: Any) -> None:
    before = dt.datetime.now(dt.UTC)
    with claim(database, "retrain", lease_seconds=30) as held:
        time.sleep(0.01)
        held.beat()
        [run] = listed(database)
    assert held.run.heartbeat_at < run.heartbeat_at and run.lease_until - run.heartbeat_at == dt.timedelta(seconds=30)
    assert abs(run.started_at - before) < dt.timedelta(minutes=5)
