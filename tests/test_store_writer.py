"""The writer: rows once and in order whatever the database does, books that balance, errors that are errors."""

import contextlib
import datetime as dt
import errno
import logging
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from faults import bound, environment
from hypothesis import given, settings
from hypothesis import strategies as st

from calling_ai.core.errors import InputError, RefusedError, SettingsError, StorageError
from calling_ai.store.database import reading
from calling_ai.store.decisions import DecisionLog, Outcome, example_decisions
from calling_ai.store.identity import pseudonyms
from calling_ai.store.schema import decisions, outcomes
from calling_ai.store.spill import Spill, encode_row, read_refused, spill_files
from calling_ai.store.writer import KINDS, LogWriter, as_row, drain, is_away, reason_of, write_apart

SECRET = b"the secret of the tests"
COLUMNS = KINDS["decision"]
Row = tuple[Any, ...]


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """Return decisions as the scorer hands them over."""
    frame = example_decisions(600, users=30, seed=4, refused=False, seed_=0).rename(columns={"seed_": "seed"})
    frame["user_key"] = pseudonyms(frame.pop("user_id"), SECRET)
    return [as_row("decision", row) for row in frame.astype(object).where(frame.notna(), None).to_dict("records")]


@pytest.fixture
def sqlite_log(tmp_path: Path, _migrated: Path) -> DecisionLog:
    """Return a log on SQLite alone, where the kind of database does not matter."""
    shutil.copy(_migrated, tmp_path / "log.db")
    return DecisionLog(f"sqlite:///{tmp_path / 'log.db'}", SECRET, wait_seconds=0.2)


def changed(row: Row, name: str, value: Any) -> Row:
    return tuple(value if column == name else item for column, item in zip(COLUMNS, row, strict=True))


def ids(log: DecisionLog) -> list[str]:
    """Return the decisions in the order in which the database got them."""
    order = "rowid" if log.database.dialect.name == "sqlite" else "xmin::text::bigint, id"
    with reading(log.database) as connection:
        return list(connection.scalars(sa.text(f"SELECT CAST(id AS TEXT) FROM decisions ORDER BY {order}")))


@contextlib.contextmanager
def locked(log: DecisionLog) -> Iterator[None]:
    """Hold the lock of an embedded database."""
    with contextlib.closing(sqlite3.connect(log.database.url.database or "", isolation_level=None)) as lock:
        lock.execute("BEGIN IMMEDIATE")
        yield


def stop(writer: LogWriter) -> None:
    """Close a writer whose database is away, and wait until its thread has let go of the files."""
    writer.close(0.1)
    for thread in writer._threads:
        thread.join()


def fail_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(errno.EIO, os.strerror(errno.EIO))))


# ------------------------------------------------------------------------------------------------- the usual way


def test_everything_arrives_in_order_on_both_databases(log: DecisionLog, rows: list[Row], tmp_path: Path) -> None:
    with LogWriter(log, folder=tmp_path / "spill", batch_rows=100) as writer:
        for row in rows:
            writer.decision(row)
            writer.outcome((f"of-{row[0]}", row[0], "neutral", 0.5, None, row[1], None, None))
        writer.expose({"experiment": "e", "stage": "1", "user_key": "ab" * 32, "arm": "a", "exposed_at": rows[0][1]})
        assert writer.flush()
        counters = writer.counters
    assert counters.handed == counters.written == 2 * len(rows) + 1 and counters.unaccounted == 0
    assert ids(log) == [row[0] for row in rows]
    assert len(log.outcomes()) == len(rows) and spill_files(tmp_path / "spill") == []


def test_a_row_that_reached_us_before_the_outage_says_when(sqlite_log: DecisionLog, tmp_path: Path) -> None:
    before = dt.datetime.now(dt.UTC)
    for durable in (False, True):
        with locked(sqlite_log), LogWriter(sqlite_log, folder=tmp_path / "spill", durable=durable) as writer:
            name = f"visit-{durable}"
            writer.outcome(
                Outcome(
                    id=name,
                    decision_id="01890a5d-ac96-774b-bcce-b302099a8057",
                    outcome_type="neutral",
                    outcome_score=0.5,
                    happened_at=before,
                )
            )
            time.sleep(0.2)
            stop(writer)
    handed = dt.datetime.now(dt.UTC)
    time.sleep(0.2)
    drain(sqlite_log, tmp_path / "spill")
    with reading(sqlite_log.database) as connection:
        received = connection.scalars(sa.select(outcomes.c.received_at)).all()
    assert len(received) == 2 and all(before <= moment <= handed for moment in received)


def test_threads_keep_their_order_and_memory_its_limit(
    sqlite_log: DecisionLog, rows: list[Row], tmp_path: Path
) -> None:
    longest: list[int] = []
    with LogWriter(sqlite_log, folder=tmp_path / "spill", capacity=50, batch_rows=20) as writer:

        def work(part: list[Row]) -> None:
            for row in part:
                writer.decision(row)
                longest.append(len(writer._rows))

        threads = [threading.Thread(target=work, args=(rows[index::6],)) for index in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert writer.flush() and writer.counters.unaccounted == 0
    position = {identifier: index for index, identifier in enumerate(ids(sqlite_log))}
    assert len(position) == len(rows) and max(longest) <= 50
    for index in range(6):
        places = [position[row[0]] for row in rows[index::6]]
        assert places == sorted(places)


def test_settings_open_the_writer(workspace: Path, rows: list[Row], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CALLING_AI_STORE__BUFFER_ROWS", "123")
    monkeypatch.setenv("CALLING_AI_STORE__FLUSH_SECONDS", "0.25")
    with LogWriter.open(workspace, batch_rows=7, durable=True) as writer:
        assert (writer.capacity, writer.flush_seconds, writer.batch_rows) == (123, 0.25, 7)
        writer.decision(rows[0])
        assert writer.flush() and writer.folder == workspace / "var" / "spill"
    with pytest.raises(InputError, match="full is 'drop': it must be one of spill, wait, raise"):
        LogWriter.open(workspace, full="drop")
    with pytest.raises(InputError, match="batch_rows is 0: it must be positive"):
        LogWriter.open(workspace, batch_rows=0)


# --------------------------------------------------------------------------------------- against a simple model


class Failing(DecisionLog):
    """A log whose database goes away at will, before or after it has committed."""

    state = "there"

    def write_rows(self, kind: str, rows: Any) -> Any:
        if self.state == "away":
            raise StorageError("database log.db failed: it cannot be reached")
        written = super().write_rows(kind, rows)
        if self.state == "silent":  # the commit landed, the answer did not
            self.state = "there"
            raise sa.exc.OperationalError("COMMIT", {}, sqlite3.OperationalError("server closed the connection"))
        return written


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("hand"), st.integers(1, 30)),
        st.tuples(st.just("again"), st.integers(1, 10)),
        st.tuples(st.just("conflict"), st.integers(1, 2)),
        st.tuples(st.sampled_from(["there", "away", "silent", "flush", "reopen"]), st.just(0)),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=12)
@given(STEPS, st.booleans(), st.sampled_from(["spill", "wait"]))
def test_any_sequence_of_events_ends_as_in_a_dictionary(
    _migrated: Path, rows: list[Row], steps: list[tuple[str, int]], durable: bool, full: str
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copy(_migrated, folder / "log.db")
        log = Failing(f"sqlite:///{folder / 'log.db'}", SECRET)
        model: dict[str, Row] = {}
        totals = {"handed": 0, "conflicts": 0}

        def new() -> LogWriter:
            options: dict[str, Any] = {"durable": durable, "full": full, "patience": 20.0, "flush_seconds": 0.02}
            return LogWriter(log, folder=folder / "spill", capacity=1000 if full == "wait" else 15, **options)

        writer, fresh = new(), iter(rows)
        for step, count in steps:
            if step in ("there", "away", "silent"):
                log.state = step
            elif step == "flush":
                writer.flush(0.02)
            elif step == "reopen":
                writer.close(0.05)
                assert writer.counters.at_risk == 0 and writer.counters.unaccounted == 0
                writer = new()
            else:
                known = list(model.values())[-count:]
                some = [next(fresh) for _ in range(count)] if step == "hand" else known
                if step == "conflict":
                    some = [changed(row, "calling_score", 0.987654) for row in some]
                    totals["conflicts"] += len(some)
                else:
                    model |= {row[0]: row for row in some}
                for row in some:
                    writer.decision(row)
        log.state = "there"
        assert writer.flush()
        counters = writer.counters
        writer.close()
        drain(log, folder / "spill")
        assert counters.unaccounted == 0 and counters.damaged == 0
        with reading(log.database) as connection:
            score = decisions.c.calling_score
            there = {row.id: row.calling_score for row in connection.execute(sa.select(decisions.c.id, score))}
        place = COLUMNS.index("calling_score")
        assert there == {identifier: row[place] for identifier, row in model.items()}
        assert len(read_refused(folder / "spill")) == totals["conflicts"]
        assert [path.name for path in spill_files(folder / "spill") if path.suffix == ".spill"] == []


# ------------------------------------------------------------------------------------------------------ bad rows


def test_bad_rows_are_put_aside_with_reason_and_never_block(
    log: DecisionLog, rows: list[Row], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad: dict[int, Any] = {
        5: changed(rows[5], "calling_score", 1.5),
        50: changed(rows[50], "path", "x" * 1_000_000),
        51: changed(rows[51], "user_key", "a name"),
        77: changed(rows[77], "decided_at", rows[0][1].replace(tzinfo=None)),
        120: changed(rows[120], "called", "yes"),
        121: rows[121][:-1],
        300: changed(rows[300], "experiment", {"a set"}),
        301: object(),
        599: changed(rows[599], "opportunity_id", "a\0b"),
    }
    with caplog.at_level(logging.WARNING), LogWriter(log, folder=tmp_path / "spill") as writer:
        for index, row in enumerate(rows):
            writer.decision(bad.get(index, row))
        assert writer.flush()
        counters = writer.counters
    assert (counters.refused, counters.written, counters.unaccounted) == (len(bad), len(rows) - len(bad), 0)
    assert ids(log) == [row[0] for index, row in enumerate(rows) if index not in bad]
    reasons = " ".join(item["reason"] for item in read_refused(tmp_path / "spill"))
    for word in ("calling_score", "path", "user_key", "decided_at", "called", "experiment", "opportunity_id", "values"):
        assert word in reasons, word
    assert sum("a row was put aside" in message for message in caplog.messages) == len(bad)


def test_bad_rows_that_went_to_the_disk_are_put_aside_too(
    sqlite_log: DecisionLog, rows: list[Row], tmp_path: Path
) -> None:
    writer = LogWriter(sqlite_log, folder=tmp_path / "spill", durable=True)
    with locked(sqlite_log):
        for row in (rows[0], object(), changed(rows[1], "gate", {1}), changed(rows[2], "gate", 7.0), rows[3]):
            writer.decision(row)
        stop(writer)
    counters = drain(sqlite_log, tmp_path / "spill")
    assert (counters.adopted, counters.written, counters.refused) == (5, 2, 3)
    assert ids(sqlite_log) == [rows[0][0], rows[3][0]]


def test_whose_fault_an_error_is() -> None:
    psycopg = pytest.importorskip("psycopg")

    def wrapped(kind: type[sa.exc.DBAPIError], cause: Exception) -> Exception:
        return kind("INSERT", {}, cause)

    away = [
        StorageError("locked"),
        SettingsError("another secret"),
        sqlite3.OperationalError("no such table: decisions"),
        wrapped(sa.exc.OperationalError, sqlite3.OperationalError("database is locked")),
        psycopg.errors.AdminShutdown("terminating connection"),
        psycopg.errors.UndefinedTable("no table"),
        psycopg.errors.DeadlockDetected("deadlock"),
        psycopg.errors.DiskFull("could not extend file"),
        psycopg.OperationalError("the connection is lost"),
        psycopg.InterfaceError("the connection is closed"),
        sa.exc.TimeoutError("pool"),
    ]
    about_rows = [
        InputError("score is 7"),
        RefusedError("conflict"),
        ValueError("anything"),
        sqlite3.IntegrityError("NOT NULL constraint failed"),
        sqlite3.DataError("string or blob too big"),
        psycopg.errors.NotNullViolation("null value"),
        psycopg.errors.NumericValueOutOfRange("out of range"),
        psycopg.errors.ProgramLimitExceeded("index row size exceeds the maximum"),
    ]
    assert [error for error in away if not is_away(error)] == []
    assert [error for error in about_rows if is_away(error)] == []
    hidden = wrapped(sa.exc.DataError, sqlite3.DataError("too big"))
    assert "INSERT" not in reason_of(hidden) and len(reason_of(ValueError("x" * 9999))) == 500


def test_a_missing_table_is_not_the_fault_of_the_rows(sqlite_log: DecisionLog, rows: list[Row], tmp_path: Path) -> None:
    sqlite_log.write_rows("decision", [])
    path = Path(sqlite_log.database.url.database or "")
    kept = path.read_bytes()
    with LogWriter(sqlite_log, folder=tmp_path / "spill", flush_seconds=0.05) as writer:
        path.write_bytes(b"")  # somebody put an empty file in its place
        for row in rows[:50]:
            writer.decision(row)
        assert not writer.flush(0.5)
        assert writer.counters.refused == 0 and "no such table" in (writer.counters.last_error or "")
        path.unlink()
        path.write_bytes(kept)
        assert writer.flush()
        assert writer.counters.last_error is None and writer.counters.away_seconds == 0
    assert ids(sqlite_log) == [row[0] for row in rows[:50]]


def test_whoever_asked_to_be_forgotten_is_dropped_and_counted(
    log: DecisionLog, rows: list[Row], tmp_path: Path
) -> None:
    person = rows[0][COLUMNS.index("user_key")]
    mine = [row for row in rows if person in row]
    with LogWriter(log, folder=tmp_path / "spill") as writer:
        for row in mine[:2]:
            writer.decision(row)
        assert writer.flush()
        log.erase(user_key=person)
        for row in rows:
            writer.decision(row)
        assert writer.flush()
        counters = writer.counters
    assert counters.forgotten == len(mine) and counters.unaccounted == 0
    assert len(ids(log)) == len(rows) - len(mine)


# ------------------------------------------------------------------------------------------------ disk and room


def test_an_error_of_fsync_is_always_a_failure(
    sqlite_log: DecisionLog, rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B5: no acknowledgement after a failed fsync; handing over again gives one row."""
    trials, raised = 60, 0
    writer = LogWriter(sqlite_log, folder=tmp_path / "spill", durable=True, patience=0.001)
    with locked(sqlite_log):
        for row in rows[:trials]:
            with monkeypatch.context() as patch:
                fail_fsync(patch)
                try:
                    writer.decision(row)
                except StorageError as error:
                    raised += "row is not safe" in str(error)
            writer._rest_until = 0.0  # do not make the test wait
            writer.decision(row)
        assert writer.counters.at_risk == 0
    assert writer.flush()
    counters = writer.counters
    writer.close()
    print(f"{raised} of {trials} failed fsyncs raised, {trials - raised} were swallowed ({bound(trials)})")
    assert raised == trials and ids(sqlite_log) == [row[0] for row in rows[:trials]]
    assert (counters.repeated, counters.unaccounted) == (trials, 0)


def test_a_durable_row_waits_for_the_database_when_the_disk_refuses(
    log: DecisionLog, rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LogWriter(log, folder=tmp_path / "spill", durable=True, flush_seconds=0.05) as writer:
        with monkeypatch.context() as patch:
            fail_fsync(patch)
            for row in rows[:5]:
                writer.decision(row)
                assert row[0] in ids(log)  # at once: nothing else has it
        assert "spill" in (writer.counters.last_error or "")
        writer._rest_until = 0.0
        writer.decision(rows[5])
        assert writer.flush() and writer.counters.last_error is None
    assert len(ids(log)) == 6


def test_a_commit_that_landed_without_an_answer_gives_one_row(tmp_path: Path, _migrated: Path, rows: list[Row]) -> None:
    shutil.copy(_migrated, tmp_path / "log.db")
    log = Failing(f"sqlite:///{tmp_path / 'log.db'}", SECRET)
    log.state = "silent"
    with LogWriter(log, folder=tmp_path / "spill", flush_seconds=0.05) as writer:
        for row in rows[:20]:
            writer.decision(row)
        assert writer.flush()
        counters = writer.counters
    assert counters.repeated > 0 and counters.repeated + counters.written == 20 and len(ids(log)) == 20


def test_waiting_callers_go_on_when_there_is_room(sqlite_log: DecisionLog, rows: list[Row], tmp_path: Path) -> None:
    writer = LogWriter(sqlite_log, folder=tmp_path / "spill", capacity=10, full="wait", flush_seconds=60, patience=30)
    with locked(sqlite_log):
        for row in rows[:10]:
            writer.decision(row)
        waiting = threading.Thread(target=lambda: [writer.decision(row) for row in rows[10:15]])
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive() and writer.counters.handed == 10
    waiting.join(20)
    assert not waiting.is_alive() and writer.flush()
    writer.close()
    assert ids(sqlite_log) == [row[0] for row in rows[:15]]


def test_the_end_says_when_rows_are_lost(
    sqlite_log: DecisionLog, rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with locked(sqlite_log), monkeypatch.context() as patch:
        fail_fsync(patch)
        writer = LogWriter(sqlite_log, folder=tmp_path / "spill")
        for row in rows[:7]:
            writer.decision(row)
        with pytest.raises(StorageError, match="7 rows are lost when this process ends"):
            writer.close(0.2)


def test_several_writers_of_one_process_share_a_folder(log: DecisionLog, rows: list[Row], tmp_path: Path) -> None:
    writers = [LogWriter(log, folder=tmp_path / "spill", durable=index > 0) for index in range(3)]
    for index, row in enumerate(rows[:150]):
        writers[index % 3].decision(row)
    for writer in writers:
        assert writer.flush()
        writer.close()
    assert sorted(ids(log)) == sorted(row[0] for row in rows[:150])
    assert sum(writer.counters.written for writer in writers) == 150


def test_rows_of_another_version_of_the_package_are_understood(
    sqlite_log: DecisionLog, rows: list[Row], tmp_path: Path
) -> None:
    names = {"decision": (*COLUMNS[:-1], "colour"), "outcome": KINDS["outcome"][::-1], "exposure": ("experiment",)}
    spill = Spill(tmp_path, names)
    outcome = ("of", rows[0][0], "neutral", 0.5, None, rows[0][1], rows[0][1], None)
    spill.append(
        [
            (1, encode_row("decision", (*rows[0][:-1], None))),  # a column that we do not know, but nothing in it
            (2, encode_row("decision", (*rows[1][:-1], "red"))),
            (3, encode_row("outcome", outcome[::-1])),
            (4, encode_row("strange", (1, 2))),
            (5, encode_row("decision", rows[2][:7])),
        ]
    )
    spill.close()
    counters = drain(sqlite_log, tmp_path)
    assert (counters.written, counters.refused, counters.unaccounted) == (2, 3, 0)
    assert ids(sqlite_log) == [rows[0][0]] and len(sqlite_log.outcomes()) == 1
    assert "this version knows no column colour" in [item["reason"] for item in read_refused(tmp_path)]


def test_halving_finds_the_bad_rows_among_the_good(sqlite_log: DecisionLog, rows: list[Row]) -> None:
    bad = {3, 4, 17, 63}
    mixed = [changed(row, "weight", 0.9) if index in bad else row for index, row in enumerate(rows[:64])]
    counts, refused = write_apart(sqlite_log, "decision", mixed)
    assert (counts["written"], counts["refused"]) == (60, 4)
    assert [row[0] for row, _ in refused] == [rows[index][0] for index in sorted(bad)]
    assert all("weight" in why for _, why in refused)


# --------------------------------------------------------------------------------------- the end of a process

START = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
import faults
faults.BASE[:] = faults.example_rows(64)
log = faults.DecisionLog(sys.argv[2], faults.SECRET)
writer = faults.LogWriter(log, folder=sys.argv[3], flush_seconds=30)
"""

ENDS = {
    "normal": "for n in range(20): writer.decision(faults.make_row(n))",
    "exception": "for n in range(20): writer.decision(faults.make_row(n))\nraise SystemExit(3)",
    "fork": """
for n in range(10): writer.decision(faults.make_row(n))
child = os.fork()
for n in range(5): writer.decision(faults.make_row(n))
if not child:
    assert writer.counters.handed == 5, writer.counters
    writer.close()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert writer.counters.handed == 15
""",
    "multiprocessing": """
import multiprocessing
for n in range(10): writer.decision(faults.make_row(n))
def work():
    for n in range(5): writer.decision(faults.make_row(n))
process = multiprocessing.get_context("fork").Process(target=work)
process.start()
process.join()
assert process.exitcode == 0
for n in range(5): writer.decision(faults.make_row(n))
""",
    "fork while it writes": """
def hand(count):
    for n in range(count): writer.decision(faults.make_row(n))
hand(1)
writer.flush()
children = []
for _ in range(6):
    hand(2)
    writer._wake.set()
    child = os.fork()
    if not child:
        hand(1)
        assert writer.flush(20)
        writer.close()
        os._exit(0)
    children.append(child)
assert [os.waitpid(child, 0)[1] for child in children] == [0] * 6
hand(1)
""",
}


@pytest.mark.parametrize("end", ENDS)
def test_however_a_process_ends_its_rows_are_there(database_url: str, tmp_path: Path, end: str) -> None:
    script = START + ENDS[end]
    arguments = [sys.executable, "-c", script, str(Path(__file__).parent), database_url, str(tmp_path / "spill")]
    done = subprocess.run(arguments, env=environment(), capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (3 if end == "exception" else 0, ""), done.stderr[-3000:]
    log = DecisionLog(database_url, SECRET_OF_HARNESS)
    drain(log, tmp_path / "spill")
    assert len(ids(log)) == len(set(ids(log))) == 20
    assert read_refused(tmp_path / "spill") == []
    log.database.dispose()


SECRET_OF_HARNESS = b"a secret for the harness"


def test_rows_and_files_carry_no_raw_user_id(sqlite_log: DecisionLog, tmp_path: Path) -> None:
    """B30: a raw id never gets as far as the disk, even when a caller gives it by mistake."""
    raw = "canary@example.com"
    frame = example_decisions(3, users=1, seed=9, user_id=raw)
    plain: list[dict[str, Any]] = frame.astype(object).where(frame.notna(), None).to_dict("records")
    keyed = [row | {"user_key": pseudonyms([raw], SECRET)[0]} for row in plain]
    with locked(sqlite_log), LogWriter(sqlite_log, folder=tmp_path / "spill", durable=True) as writer:
        for row in (*plain, *keyed):
            writer.decision(row)
        stop(writer)
    assert all(raw.encode() not in path.read_bytes() for path in spill_files(tmp_path / "spill"))
    counters = drain(sqlite_log, tmp_path / "spill")
    assert (counters.written, counters.refused) == (3, 3)
    for path in [*spill_files(tmp_path / "spill"), tmp_path / "log.db"]:
        assert raw.encode() not in path.read_bytes()
