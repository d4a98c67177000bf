"""The database: transactions of several processes, locks, journal, and errors in words."""

import datetime as dt
import multiprocessing
import sqlite3

import pytest
import sqlalchemy as sa

from calling_ai.core.errors import InputError, IntegrityError, StorageError
from calling_ai.store.database import (
    Moment,
    create_tables,
    engine,
    explain_database_error,
    journal_mode,
    metadata,
    reading,
    writing,
)

schema = sa.MetaData()
counts = sa.Table(
    "counts",
    schema,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("value", sa.Integer),
    sa.Column("at", Moment),
)
notes = sa.Table(
    "notes", schema, sa.Column("number", sa.Integer, primary_key=True), sa.Column("name", sa.ForeignKey("counts.name"))
)


def count_up(url: str, times: int) -> None:
    "Read, then write, in one transaction: with a deferred lock this fails as locked or loses counts."
    database = engine(url)
    create_tables(database, schema)
    for _ in range(times):
        with writing(database) as connection:
            value = connection.scalar(sa.select(counts.c.value)) or 0
            connection.execute(counts.delete())
            connection.execute(counts.insert().values(name="n", value=value + 1, at=dt.datetime.now(dt.UTC)))


@pytest.fixture
def database(tmp_path):
    made = engine(f"sqlite:///{tmp_path / 'sub' / 'test.db'}", busy_seconds=0.05)
    create_tables(made, schema)
    return made


def test_processes_that_read_and_write_lose_nothing(tmp_path):
    url = f"sqlite:///{tmp_path / 'race.db'}"
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=count_up, args=(url, 25)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    with reading(engine(url)) as connection:
        assert connection.scalar(sa.select(counts.c.value)) == 100
        assert connection.exec_driver_sql("PRAGMA integrity_check").scalar() == "ok"


def test_all_or_nothing(database):
    with pytest.raises(KeyboardInterrupt), writing(database) as connection:
        connection.execute(counts.insert().values(name="a", value=1))
        raise KeyboardInterrupt
    with pytest.raises(sa.exc.IntegrityError), writing(database) as connection:
        connection.execute(counts.insert().values(name="b", value=1))
        connection.execute(notes.insert().values(name="nobody"))  # foreign keys are on
    with reading(database) as connection:
        assert connection.execute(sa.select(counts)).all() == []


def test_schema_changes_are_undone_too(database):
    with pytest.raises(ZeroDivisionError), writing(database) as connection:
        connection.exec_driver_sql("CREATE TABLE extra (x)")
        _ = 1 / 0
    with reading(database) as connection:
        assert not sa.inspect(connection).has_table("extra")


def test_reader_sees_one_state_and_does_not_take_the_write_lock(database):
    with reading(database) as first, reading(database) as second:
        assert first.scalar(sa.select(sa.func.count()).select_from(counts)) == 0
        assert second.scalar(sa.select(sa.func.count()).select_from(counts)) == 0
    with writing(database), pytest.raises(StorageError, match="another process holds the lock"), writing(database):
        pass


def test_moments_keep_their_meaning(database):
    berlin = dt.datetime(2026, 3, 29, 3, 30, 0, 123456, tzinfo=dt.timezone(dt.timedelta(hours=2)))
    with writing(database) as connection:
        connection.execute(counts.insert().values(name="a", at=berlin))
        connection.execute(counts.insert().values(name="b"))
    with reading(database) as connection:
        kept, none = connection.scalars(sa.select(counts.c.at).order_by(counts.c.name))
    assert kept == berlin and kept.tzinfo is dt.UTC and none is None
    with (
        pytest.raises((InputError, sa.exc.StatementError), match="must carry a time zone"),
        writing(database) as connection,
    ):
        connection.execute(counts.insert().values(name="c", at=dt.datetime(2026, 1, 1)))


def test_damaged_file_is_named(tmp_path):
    (tmp_path / "bad.db").write_bytes(b"this was a database once" * 300)
    with (
        pytest.raises(IntegrityError, match=r"database bad\.db failed: the file is damaged"),
        reading(engine(f"sqlite:///{tmp_path / 'bad.db'}")),
    ):
        pass


def test_missing_and_blocked_folders_are_named(tmp_path):
    with (
        pytest.raises(StorageError, match="cannot be opened"),
        reading(engine(f"sqlite:///{tmp_path / 'no' / 'x.db'}")),
    ):
        pass
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="its folder cannot be made"):
        create_tables(engine(f"sqlite:///{tmp_path / 'file' / 'x.db'}"), schema)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("database is locked", StorageError),
        ("database or disk is full", StorageError),
        ("attempt to write a readonly database", StorageError),
        ("disk I/O error", StorageError),
        ("database disk image is malformed", IntegrityError),
        ("connection refused", StorageError),
    ],
)
def test_each_state_has_a_cause_and_a_remedy(text, kind):
    told = explain_database_error(sqlite3.OperationalError(text), "x.db")
    assert isinstance(told, kind) and "x.db failed: " in str(told) and ";" in str(told)


def test_mistakes_in_statements_are_not_hidden(database):
    assert explain_database_error(sqlite3.OperationalError("no such table: x"), "x.db") is None
    with pytest.raises(sa.exc.OperationalError, match="no such table"), reading(database) as connection:
        connection.exec_driver_sql("SELECT * FROM nowhere")


def test_urls():
    assert (
        engine("postgresql+psycopg://someone:secret@nowhere/db").dialect.name == "postgresql"
        if _has_psycopg()
        else True
    )
    for url in ("mysql://x/y", "not a url"):
        with pytest.raises(InputError, match="must be"):
            engine(url)


def _has_psycopg() -> bool:
    import importlib.util

    return importlib.util.find_spec("psycopg") is not None


def test_journal_follows_the_library(database):
    with reading(database) as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == journal_mode()
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 3
    assert journal_mode((3, 51, 2)) == "delete" and journal_mode((3, 51, 3)) == "wal"


def test_shared_schema_names_every_constraint():
    import calling_ai.registry.versions  # noqa: F401 - declares its tables on the shared schema

    for table in metadata.tables.values():
        assert all(constraint.name for constraint in table.constraints), table.name
