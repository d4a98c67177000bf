"""How long a snapshot of the log takes, beside a bare SELECT of the same columns.

Run with `python benchmarks/bench_snapshot.py [rows ...] [--url URL] [--forget]`; the default is 10,000, 100,000 and
1,000,000 decisions with outcomes, corrections and history in SQLite. Each snapshot is written in a process of its own,
whose peak memory is shown. The baseline reads the same columns through the driver and throws them away. The growth is
the time a row from the smallest to the largest log, held against n log n. `--forget` then erases one person from the
largest log and its snapshot and proves it.
"""

import argparse
import datetime as dt
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import sqlalchemy as sa

from calling_ai.store.database import reading
from calling_ai.store.decisions import DecisionLog, example_decisions, example_outcomes
from calling_ai.store.labels import log_columns
from calling_ai.store.privacy import forget
from calling_ai.store.schema import decisions
from calling_ai.store.snapshots import Parts, snapshot

SECRET = b"a secret for benchmarks"
START = dt.datetime(2025, 1, 6, tzinfo=dt.UTC)
BLOCK = 100_000
DAYS = 56.0


def fill(url: str, rows: int) -> float:
    """Write a log of about fifty decisions a person, three of a hundred outcomes corrected; return the seconds."""
    log, begin = DecisionLog(url, SECRET), time.perf_counter()
    for block in range(-(-rows // BLOCK)):
        count = min(BLOCK, rows - block * BLOCK)
        share = DAYS * count / rows
        start = START + dt.timedelta(days=DAYS * block * BLOCK / rows)
        made = example_decisions(count, users=max(5, rows // 50), seed=block, start=start, days=share)
        log.record_frame(made)
        told = example_outcomes(made[made["called"]], share=0.9, seed=block)
        log.record_outcomes(told)
        fixed = told.sample(frac=0.03, random_state=block)
        log.record_outcomes(
            fixed.assign(
                id="fix-" + fixed["id"],
                corrects=fixed["id"],
                outcome_score=0.5,
                outcome_type="neutral",
                received_at=fixed["received_at"] + np.timedelta64(1, "D"),
            )
        )
    return time.perf_counter() - begin


def write(url: str, folder: str) -> None:
    """Write one snapshot and print time and peak memory; runs in a process of its own."""
    begin = time.perf_counter()
    until = START + dt.timedelta(days=DAYS)
    kept = snapshot(
        DecisionLog(url, SECRET), START, until, folder=folder, parts=Parts(test_from=until - dt.timedelta(days=14))
    )
    seconds, used = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF)
    found = {"seconds": seconds, "cpu": time.process_time(), "peak_gib": used.ru_maxrss / 2**20}
    print(json.dumps({"rows": kept.rows, "counts": kept.counts, **found}))


def select(url: str) -> tuple[float, float]:
    """Return seconds and processor seconds of a bare SELECT of the same columns, rows thrown away as they come."""
    log = DecisionLog(url, SECRET)
    chosen = sa.select(*(sa.type_coerce(column, sa.Text) for column in log_columns().values())).order_by(decisions.c.id)
    begin, used = time.perf_counter(), time.process_time()
    with reading(log.database) as connection:
        result = connection.execution_options(stream_results=log.database.dialect.name != "sqlite").execute(chosen)
        while result.cursor.fetchmany(16_384):  # type: ignore[attr-defined]
            pass
        result.close()
    return time.perf_counter() - begin, time.process_time() - used


def main() -> None:
    """Print one line a measurement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", type=int, default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--url", help="an empty PostgreSQL database; by default SQLite in a temporary folder")
    parser.add_argument("--forget", action="store_true", help="erase one person from the largest log afterwards")
    parser.add_argument("--write", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write:
        return write(*options.write)
    per_row = {}
    with tempfile.TemporaryDirectory() as folder:
        for rows in options.rows if options.url is None else options.rows[-1:]:
            home = Path(folder) / str(rows)
            home.mkdir()
            url = options.url or f"sqlite:///{home / 'log.db'}"
            filled = fill(url, rows)
            bare, bare_cpu = select(url)
            done = subprocess.run(
                [sys.executable, __file__, "--write", url, str(home / "snapshots")],
                capture_output=True,
                text=True,
                check=True,
            )
            found = json.loads(done.stdout)
            per_row[rows] = found["seconds"] / rows
            print(
                f"{rows:>9,} decisions, {found['counts']['with_outcome']:,} with an outcome: snapshot "
                f"{found['seconds']:.1f} s ({found['cpu']:.1f} s of processors), peak {found['peak_gib']:.2f} GiB; "
                f"bare SELECT {bare:.1f} s ({bare_cpu:.1f}); ratio {found['seconds'] / bare:.2f} "
                f"({found['cpu'] / bare_cpu:.2f}); log filled in {filled:.0f} s",
                flush=True,
            )
        few, many = min(per_row), max(per_row)
        if few < many:
            growth, allowed = per_row[many] / per_row[few], math.log(many) / math.log(few)
            print(f"time a row grows by {growth:.2f} from {few:,} to {many:,}; n log n would be {allowed:.2f}")
        if options.forget:
            log = DecisionLog(url, SECRET)
            gone = forget(log, "person-3", folder=home, spill=home / "spill", snapshots=home / "snapshots")
            print(
                f"forget at {rows:,} rows: {gone.decisions} decisions, {gone.outcomes} outcomes, {len(gone.snapshots)} "
                f"snapshot in {gone.seconds:.1f} s (limit 60); {gone.searched.size / 2**20:,.0f} MiB searched, "
                f"{gone.found} occurrences left"
            )


if __name__ == "__main__":
    main()
