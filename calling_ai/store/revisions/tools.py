"""What the steps share: a step on the way down sets rows aside instead of dropping them, and finds them on the way up.

A downgrade removes what the older schema does not know. A table with rows is renamed to `kept_NAME` and stays; the
upgrade gives it its name back. So a downgrade by mistake, or one to go back to an older release for a day, loses nothing.
"""

from typing import Any

import sqlalchemy as sa
from alembic import op

KEPT = "kept_"


def is_sqlite() -> bool:
    """Say whether this is SQLite."""
    return op.get_bind().dialect.name == "sqlite"


def has_table(name: str) -> bool:
    """Say whether a table exists."""
    return sa.inspect(op.get_bind()).has_table(name)


def make_table(name: str, *parts: Any) -> bool:
    """Give a table its name back, adopt it, or create it; say whether it was created."""
    if has_table(KEPT + name):
        op.rename_table(KEPT + name, name)
        return False
    if has_table(name):  # made before there were migrations
        return False
    op.create_table(name, *parts)
    return True


def remove_table(name: str) -> None:
    """Set a table aside if it has rows, or drop it."""
    if op.get_bind().execute(sa.text(f"SELECT 1 FROM {name} LIMIT 1")).first() is None:
        op.drop_table(name)
    else:
        op.rename_table(name, KEPT + name)


def time() -> Any:
    """Return the type of a moment."""
    return sa.DateTime(timezone=True)


def identifier() -> Any:
    """Return the type of a UUID."""
    return sa.CHAR(36) if is_sqlite() else sa.dialects.postgresql.UUID(as_uuid=False)


def text() -> Any:
    """Return the type of a text that sorts by bytes."""
    return sa.Text() if is_sqlite() else sa.Text(collation="C")


def protect(table: str, unless: str = "", words: str = "are only ever added") -> None:
    """Refuse to change rows, and to delete them unless the condition on the row `OLD` holds."""
    release(table)
    if is_sqlite():
        for change in ("UPDATE", "DELETE"):
            door = f"WHEN NOT ({unless})" if unless and change == "DELETE" else ""
            op.execute(
                f"CREATE TRIGGER {table}_no_{change.lower()} BEFORE {change} ON {table} {door} "
                f"BEGIN SELECT RAISE(ABORT, '{table} {words}'); END"
            )
        return
    door = f"IF TG_OP = 'DELETE' THEN IF {unless} THEN RETURN OLD; END IF; END IF; " if unless else ""
    op.execute(
        f"CREATE FUNCTION {table}_only_added() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {door}"
        f"RAISE EXCEPTION '{table} {words}' USING ERRCODE = 'restrict_violation'; END $$"
    )
    for change in ("UPDATE", "DELETE"):
        op.execute(
            f"CREATE TRIGGER {table}_no_{change.lower()} BEFORE {change} ON {table} "
            f"FOR EACH ROW EXECUTE FUNCTION {table}_only_added()"
        )
    op.execute(
        f"CREATE TRIGGER {table}_no_truncate BEFORE TRUNCATE ON {table} "
        f"FOR EACH STATEMENT EXECUTE FUNCTION {table}_only_added()"
    )


def release(table: str) -> None:
    """Take the protection of a table away."""
    for change in ("update", "delete", "truncate"):
        if is_sqlite():
            op.execute(f"DROP TRIGGER IF EXISTS {table}_no_{change}")
        else:
            op.execute(f"DROP TRIGGER IF EXISTS {table}_no_{change} ON {table}")
    if not is_sqlite():
        op.execute(f"DROP FUNCTION IF EXISTS {table}_only_added()")
