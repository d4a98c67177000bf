"""Migrations go up and down and lose no row; many at once are one; a killed one leaves the old schema or the new."""

import datetime as dt
import hashlib
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Engine

import calling_ai.registry.versions as registry
import calling_ai.store.schema as schema
from calling_ai.core.errors import InputError, StorageError
from calling_ai.registry.ledger import verify_chain
from calling_ai.store import revisions
from calling_ai.store.database import create_tables, engine, reading, writing
from calling_ai.store.decisions import DecisionLog, example_decisions, example_outcomes
from calling_ai.store.migrations import downgrade, ensure, status, steps, upgrade

SECRET = b"the secret of the tests"
NOW = dt.datetime(2025, 3, 3, 12, tzinfo=dt.UTC)
HEAD = steps()[-1][0]


def declared() -> sa.MetaData:
    """Return the schema as the package declares it, whatever examples did to the shared one."""
    made = sa.MetaData(naming_convention=schema.metadata.naming_convention)
    for module in (registry, schema):
        for item in vars(module).values():
            if isinstance(item, sa.Table) and item.name not in made.tables:
                item.to_metadata(made)
    for name, item in schema.metadata.tables.items():  # those of other areas
        if name not in made.tables:
            item.to_metadata(made)
    return made


def fill(database: Engine) -> None:
    """Put rows into every table of the registry and of the log."""
    with writing(database) as connection:
        held = {name: {} for name in ("metrics", "notebook_digests", "parameters", "seeds", "environment")}
        for minor in range(3):
            row = {
                "model": "outcome",
                "version": f"v1.{minor}-town",
                "source": "town",
                "status": "staging",
                "digest": "d",
            }
            row |= {"snapshot_digest": "s", "major": 1, "minor": minor, "size": 3, "created_at": NOW, **held}
            connection.execute(registry.versions_table.insert().values(**row))
        connection.execute(
            registry.aliases_table.insert().values(model="outcome", alias="champion", version="v1.0-town")
        )
        registry.Change(connection, "me").note("register", "v1.0-town", None, "staging", {"auc": 0.7}, "outcome")
    log = DecisionLog(database.url.render_as_string(hide_password=False), SECRET)
    frame = example_decisions(60, users=6)
    log.record_frame(frame)
    log.record_outcomes(example_outcomes(frame))
    log.expose([{"experiment": "e", "stage": "s", "user_id": "person-1", "arm": "a", "exposed_at": NOW}])
    log.erase(user="person-2")
    log.database.dispose()


def checksums(database: Engine) -> dict[str, str]:
    """Return a digest of the rows of each table, by the name that it has when it is not set aside."""
    found = {}
    with reading(database) as connection:
        for name in sa.inspect(connection).get_table_names():
            rows = sorted(str(tuple(row)) for row in connection.execute(sa.text(f'SELECT * FROM "{name}"')))  # noqa: S608
            if name != "alembic_version":
                found[name.removeprefix("kept_")] = hashlib.sha256("\n".join(rows).encode()).hexdigest()
    return found


def shape(database: Engine) -> list[str]:
    """Return the schema as text: tables, columns, keys, indexes, views, triggers."""
    with reading(database) as connection:
        look = sa.inspect(connection)
        lines = [f"view {name}" for name in look.get_view_names()]
        for table in look.get_table_names():
            lines += [
                f"{table} {column['name']} {column['type']} {column['nullable']}" for column in look.get_columns(table)
            ]
            lines += [f"{table} index {index['name']} {index['column_names']}" for index in look.get_indexes(table)]
            lines += [f"{table} key {look.get_pk_constraint(table)['constrained_columns']}"]
            lines += [f"{table} {key['name']} to {key['referred_table']}" for key in look.get_foreign_keys(table)]
        if database.dialect.name == "sqlite":
            lines += connection.scalars(sa.text("SELECT name FROM sqlite_master WHERE type = 'trigger'")).all()
        else:
            lines += connection.scalars(sa.text("SELECT tgname FROM pg_trigger WHERE NOT tgisinternal")).all()
        return sorted(line for line in lines if not line.startswith("alembic_version"))


# ----------------------------------------------------------------------------------------------------- up and down


def test_up_down_up_keeps_every_row(new_database: Callable[..., str]) -> None:
    database = engine(new_database(empty=True))
    assert status(database).revision is None and upgrade(database).revision == HEAD
    fill(database)
    rows, full = checksums(database), shape(database)
    assert all(
        rows[name] != hashlib.sha256(b"").hexdigest() for name in ("decisions", "outcomes", "versions", "forgotten")
    )
    for target in [number for number, _ in reversed(steps()[:-1])] + ["base"]:
        stands = downgrade(database, target)
        assert stands.revision == (None if target == "base" else target)
        now = checksums(database)
        assert now == {name: digest for name, digest in rows.items() if name in now}
        assert {
            name for name, digest in rows.items() if name not in now and digest != hashlib.sha256(b"").hexdigest()
        } == set()
        assert upgrade(database).current and checksums(database) == rows and shape(database) == full
    downgrade(database, "base")
    for number, _ in steps():
        assert upgrade(database, number).revision == number
    assert checksums(database) == rows and shape(database) == full
    with pytest.raises(sa.exc.DBAPIError, match="only ever added"), writing(database) as connection:
        connection.execute(sa.text("DELETE FROM decisions"))
    database.dispose()


def test_a_downgrade_of_empty_tables_leaves_nothing(new_database: Callable[..., str]) -> None:
    database = engine(new_database())
    assert downgrade(database, "base").revision is None
    assert shape(database) == []
    database.dispose()


def test_the_migrations_make_what_the_package_declares(new_database: Callable[..., str]) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    database = engine(new_database())
    with reading(database) as connection:
        different = compare_metadata(MigrationContext.configure(connection, opts={"compare_type": True}), declared())
    assert [item for item in different if "kept_" not in str(item)] == []
    database.dispose()


def test_a_database_made_without_migrations_is_adopted(new_database: Callable[..., str]) -> None:
    database, made = engine(new_database(empty=True)), sa.MetaData(naming_convention=schema.metadata.naming_convention)
    for table in (registry.versions_table, registry.aliases_table, registry.events_table):
        table.to_metadata(made)
    create_tables(database, made)
    with writing(database) as connection:
        event = {
            "action": "register",
            "model": "outcome",
            "subject": "v1.0-town",
            "actor": "me",
            "evidence": {"auc": 0.7},
        }
        for number in range(3):
            connection.execute(registry.events_table.insert().values(at=NOW + dt.timedelta(hours=number), **event))
        if database.dialect.name == "sqlite":  # as the registry made it
            refuse = "BEGIN SELECT RAISE(ABORT, 'events are only ever added'); END"
            connection.execute(
                sa.text(f"CREATE TRIGGER registry_events_no_delete BEFORE DELETE ON registry_events {refuse}")
            )
    assert upgrade(database).current
    with reading(database) as connection:
        rows = connection.execute(sa.select(registry.events_table).order_by(registry.events_table.c.number)).mappings()
        rows, head = [dict(row) for row in rows], connection.scalar(sa.select(schema.facts.c.value))
    assert [row["at"] for row in rows] == [NOW + dt.timedelta(hours=number) for number in range(3)]
    assert all({name: row[name] for name in event} == event for row in rows), "nothing is changed but the digests"
    assert verify_chain(rows, head) is None, "the past is chained as the present is"
    fresh = engine(new_database())
    assert shape(database) == shape(fresh)
    with pytest.raises(sa.exc.DBAPIError, match="events are only ever added"), writing(database) as connection:
        connection.execute(sa.text("UPDATE registry_events SET actor = 'you'"))
    database.dispose()
    fresh.dispose()


def test_what_pytest_alembic_checks(new_database: Callable[..., str]) -> None:
    from alembic.config import Config
    from pytest_alembic import tests
    from pytest_alembic.config import Config as Settings
    from pytest_alembic.runner import runner

    settings = Settings(config_options={"script_location": str(Path(revisions.__file__).parent)})
    for check in (tests.test_single_head_revision, tests.test_upgrade, tests.test_up_down_consistency):
        database = engine(new_database(empty=True))
        with runner(config=settings, engine=database) as alembic:
            assert isinstance(alembic.command_executor.alembic_config, Config)
            check(alembic)
        database.dispose()


# ----------------------------------------------------------------------------------------------- many, and killed


def test_ten_upgrades_at_once_are_one(new_database: Callable[..., str]) -> None:
    url = new_database(empty=True)
    context = multiprocessing.get_context("fork")
    queue, start = context.Queue(), context.Event()

    def run() -> None:
        start.wait()
        try:
            queue.put(upgrade(engine(url)).revision)
        except BaseException as error:
            queue.put(f"{type(error).__name__}: {error}")

    made = [context.Process(target=run) for _ in range(10)]
    for process in made:
        process.start()
    start.set()
    said = [queue.get(timeout=120) for _ in made]
    for process in made:
        process.join()
    assert said == [HEAD] * 10
    database, fresh = engine(url), engine(new_database())
    assert shape(database) == shape(fresh)
    with reading(database) as connection:
        assert connection.scalars(sa.text("SELECT version_num FROM alembic_version")).all() == [HEAD]
    database.dispose()
    fresh.dispose()


def killed_at(work: Callable[[Engine], Any], url: str, number: int) -> bool:
    """Run `work` in a forked process that kills itself before its statement of that number; say whether it did."""
    child = os.fork()
    if child == 0:
        try:
            database, seen = engine(url), [0]

            @sa.event.listens_for(database, "before_cursor_execute")
            def kill(*_: Any) -> None:
                seen[0] += 1
                if seen[0] == number:
                    os.kill(os.getpid(), signal.SIGKILL)

            work(database)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.slow
def test_a_killed_migration_leaves_the_old_or_the_new_schema(new_database: Callable[..., str]) -> None:
    import alembic.command  # noqa: F401 - once, before the forks

    url = new_database(empty=True)
    database = engine(url)
    upgrade(database)
    fill(database)
    new, rows = shape(database), checksums(database)
    downgrade(database, "0001")
    old = shape(database)
    database.dispose()
    faults = 0
    for work, target in ((lambda db: upgrade(db), new), (lambda db: downgrade(db, "0001"), old)):
        number, reached = 1, False
        while not reached:
            reached = not killed_at(work, url, number)
            found = shape(database)
            assert found in (old, new), f"killed at statement {number}"
            assert checksums(database) == {name: rows[name] for name in checksums(database)}
            faults, number = faults + (not reached), number + (1 if number < 12 else 5)
            database.dispose()
        assert shape(database) == target
        database.dispose()
    print(f"killed {faults} times during migrations: 0 half-made schemas (95 % below {3 / faults:.0%})")
    assert faults >= 15


# ------------------------------------------------------------------------------------------------------- questions


def test_what_a_migration_is_asked_wrongly(tmp_path: Path) -> None:
    database = engine(f"sqlite:///{tmp_path / 'deep' / 'er' / 'log.db'}")
    assert len(status(database).pending) == len(steps()) and not (tmp_path / "deep").exists()
    with pytest.raises(InputError, match="revision is 'tomorrow': it must be one of 0001, 0002"):
        upgrade(database, "tomorrow")
    with pytest.raises(InputError, match="at the base already"):
        downgrade(database, "-1")
    upgrade(database, "0001")
    with pytest.raises(InputError, match="which is below; use upgrade"):
        downgrade(database, "0002")
    assert upgrade(database, "0001").revision == "0001" and ensure(database).current
    assert upgrade(database, "0001").revision == HEAD, "up never goes down"


def test_a_schema_of_the_future_is_left_alone(database_url: str) -> None:
    database = engine(database_url)
    with writing(database) as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    for ask in (status, upgrade, ensure, lambda db: downgrade(db, "base")):
        with pytest.raises(
            StorageError, match="has the schema 9999, and this version of calling_ai knows .* upgrade calling_ai"
        ):
            ask(database)
    database.dispose()


def test_the_registry_goes_through_the_migrations(workspace: Path) -> None:
    found = registry.Registry(workspace)
    (workspace / "model.onnx").write_bytes(b"a model")
    found.register([registry.VersionDraft("outcome", "town", workspace / "model.onnx")])
    assert status(found.database).current
    assert DecisionLog.open(workspace).counts().decisions == 0


def test_the_command(workspace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from calling_ai.cli import main

    assert main(["db", "status"]) == 0 and "schema none yet" in capsys.readouterr().out
    assert main(["db", "upgrade"]) == 0 and "up to date" in capsys.readouterr().out
    assert main(["db", "downgrade", "-1"]) == 0 and f"this version needs {HEAD}" in capsys.readouterr().out
    assert main(["db", "downgrade", "nowhere"]) == 1 and "revision is 'nowhere'" in capsys.readouterr().err
    assert main(["db", "upgrade", "--json"]) == 0 and f'"head": "{HEAD}"' in capsys.readouterr().out
    monkeypatch.setenv("CALLING_AI_STORE__URL", "mysql://somewhere/else")
    assert main(["db", "status"]) == 1 and "it must be sqlite or postgresql" in capsys.readouterr().err


def test_the_url_selects_the_database(
    workspace: Path, postgresql: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from calling_ai.cli import main

    url = postgresql.new(empty=True)
    monkeypatch.setenv("CALLING_AI_STORE__URL", url)
    monkeypatch.setenv("CALLING_AI_USER_SECRET", "sixteen letters!")
    with pytest.raises(StorageError, match="run calling-ai db upgrade"):
        DecisionLog.open(workspace).record_frame(example_decisions(3))
    assert main(["db", "upgrade"]) == 0 and capsys.readouterr().out.startswith("postgresql: schema")
    log = DecisionLog.open(workspace)
    assert log.record_frame(example_decisions(3)).written == 3 and not (workspace / "var" / "calling_ai.db").exists()
    log.database.dispose()
    postgresql.drop(url)
