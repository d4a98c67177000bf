"""What handing a decision over to the log costs the caller, and what the writer makes of a database, in one run.

    python benchmarks/bench_writer.py [--rows 50000] [--url postgresql://user@host/database]

The baseline of each ratio is named in its line. Calls are timed one by one, the cost of the clock included: median and
99th percentile. The database is written to in the background all the while, by the same process.
"""

import argparse
import os
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from calling_ai.store.decisions import DecisionLog, example_decisions
from calling_ai.store.identity import pseudonyms
from calling_ai.store.spill import encode_row
from calling_ai.store.writer import LogWriter, as_row

SECRET = b"a secret for benchmarks"


def decisions(rows: int) -> list[tuple[Any, ...]]:
    "Return decisions as the scorer hands them over."
    frame = example_decisions(rows, users=1000)
    frame["user_key"] = pseudonyms(frame.pop("user_id"), SECRET)
    return [as_row("decision", row) for row in frame.astype(object).where(frame.notna(), None).to_dict("records")]


def one_by_one(call: Callable[[Any], object], items: Sequence[Any], pause: float = 0.0) -> tuple[float, float, float]:
    "Return median, 99th percentile and largest time of a call, in microseconds."
    times = np.empty(len(items))
    for index, item in enumerate(items):
        if pause and index % 100 == 0:
            time.sleep(pause)
        start = time.perf_counter_ns()
        call(item)
        times[index] = time.perf_counter_ns() - start
    return float(np.median(times)) / 1e3, float(np.percentile(times, 99)) / 1e3, float(times.max()) / 1e3


def head(name: str) -> None:
    "Print the head of a table of latencies."
    print(f"\n{name:58}{'median us':>10}{'p99 us':>10}{'largest us':>12}   {'ratio':>8}")


def show(name: str, figures: tuple[float, float, float], base: float) -> None:
    "Print a line of the table of latencies."
    median, tail, largest = figures
    print(f"{name:58}{median:10.2f}{tail:10.1f}{largest:12.0f}   {median / base:8.1f}")


def together(call: Callable[[Any], object], items: Sequence[Any], threads: int) -> float:
    "Return how many calls a second some threads make together."
    parts = [items[index::threads] for index in range(threads)]
    workers = [threading.Thread(target=lambda part=part: [call(item) for item in part]) for part in parts]
    start = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return len(items) / (time.perf_counter() - start)


def main() -> None:
    "Measure and print."
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--rows", type=int, default=50_000)
    options.add_argument("--durable-rows", type=int, default=2_000)
    options.add_argument("--url", default="", help="an empty PostgreSQL database; by default SQLite")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), chosen)


def measure(folder: Path, chosen: argparse.Namespace) -> None:
    "Measure in a folder of its own."
    rows = decisions(chosen.rows)
    log = DecisionLog(chosen.url or f"sqlite:///{folder / 'log.db'}", SECRET)
    print(f"{len(rows):,} decisions of {len(rows[0])} columns into {log.database.dialect.name}")
    head("one decision handed over")
    simple: queue.SimpleQueue[Any] = queue.SimpleQueue()
    base = one_by_one(simple.put, rows)
    show("queue.SimpleQueue.put of the same row", base, base[0])
    fifo: queue.Queue[Any] = queue.Queue()
    show("queue.Queue.put", one_by_one(fifo.put, rows), base[0])
    with LogWriter(log, folder=folder / "spill", capacity=10 * len(rows)) as writer:
        steady = rows[: len(rows) // 2]
        show("LogWriter.decision, 100 at a time, 10 ms apart", one_by_one(writer.decision, steady, 0.01), base[0])
        writer.flush(600)
        start = time.perf_counter()
        show("LogWriter.decision, all at once", one_by_one(writer.decision, rows[len(steady) :]), base[0])
        writer.flush(600)
        through = len(rows[len(steady) :]) / (time.perf_counter() - start)
        assert writer.counters.written == len(rows), writer.counters

    few = decisions(3 * chosen.durable_rows)[-3 * chosen.durable_rows :]
    part = chosen.durable_rows
    handle = os.open(folder / "bare", os.O_CREAT | os.O_WRONLY | os.O_APPEND)

    def bare(row: Any) -> None:
        os.write(handle, encode_row("decision", row))
        os.fsync(handle)

    head("one decision that kill -9 cannot take")
    base = one_by_one(bare, few[:part])
    show("the same bytes appended to a file, and fsync", base, base[0])
    other = DecisionLog(f"sqlite:///{folder / 'durable.db'}", SECRET)
    direct = one_by_one(lambda row: other.write_rows("decision", [row]), few[: part // 10])
    show("written into SQLite, one transaction each", direct, base[0])
    with LogWriter(other, folder=folder / "durable", durable=True) as writer:
        show("LogWriter.decision, durable, one thread", one_by_one(writer.decision, few[part : 2 * part]), base[0])
        eight = together(writer.decision, few[2 * part :], 8)
        writer.flush(600)
        assert writer.counters.unaccounted == 0, writer.counters
    ratio = eight * base[0] / 1e6
    print(f"{'eight threads together':58}{eight:10,.0f} decisions/s, {ratio:.2f} of the bare file's rate")

    third = DecisionLog(f"sqlite:///{folder / 'batches.db'}", SECRET)
    half = rows[len(rows) // 2 :]
    start = time.perf_counter()
    for first in range(0, len(half), 500):
        third.write_rows("decision", half[first : first + 500])
    batches = len(half) / (time.perf_counter() - start)
    print(f"\n{'into the database':58}{'rows/s':>10}   ratio")
    print(f"{'DecisionLog.write_rows, 500 at a time, nothing else':58}{batches:10,.0f}   baseline")
    print(f"{'LogWriter from the first hand-over to flush':58}{through:10,.0f}   {through / batches:.2f}")


if __name__ == "__main__":
    main()
