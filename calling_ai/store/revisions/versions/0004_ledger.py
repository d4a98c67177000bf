"""The ledger: every event carries the digest of the one before it, and there is one chain only."""

import datetime as dt
import hashlib
import json
from typing import Any

import sqlalchemy as sa
from alembic import op

from calling_ai.store.revisions.tools import protect, release, time

revision, down_revision = "0004", "0003"
branch_labels = depends_on = None

EVENTS = sa.table(
    "registry_events",
    sa.column("number", sa.Integer),
    sa.column("at", time()),
    *(sa.column(name, sa.Text) for name in ("action", "model", "subject", "actor", "before", "after")),
    *(sa.column(name, sa.Text) for name in ("digest", "previous_digest")),
    sa.column("evidence", sa.JSON),
)
INDEX = "uq_registry_events_previous_digest"
HASHED = ("number", "at", "action", "model", "subject", "before", "after", "actor", "evidence")


def digest_of(previous: str, row: Any) -> str:
    """Return the digest of an event as it was defined when this step was made."""
    at = row["at"] if row["at"].tzinfo else row["at"].replace(tzinfo=dt.UTC)
    told = {name: row[name] for name in HASHED} | {"at": at.astimezone(dt.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")}
    text = json.dumps(told, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(f"{previous}\n{text}".encode()).hexdigest()


def upgrade() -> None:
    """Chain the events that are not chained yet, and see to it that the chain cannot fork."""
    connection, previous = op.get_bind(), "0" * 64
    release("registry_events")
    for row in connection.execute(sa.select(EVENTS).order_by(EVENTS.c.number)).mappings().all():
        if row["digest"] is None:
            made = {"previous_digest": previous, "digest": digest_of(previous, row)}
            connection.execute(EVENTS.update().where(EVENTS.c.number == row["number"]).values(made))
            previous = made["digest"]
        else:
            previous = row["digest"]
    protect("registry_events", words="events are only ever added")
    connection.execute(sa.text("DELETE FROM facts WHERE name = 'ledger_head'"))
    if previous != "0" * 64:
        connection.execute(sa.text("INSERT INTO facts (name, value) VALUES ('ledger_head', :head)"), {"head": previous})
    if INDEX not in {index["name"] for index in sa.inspect(connection).get_indexes("registry_events")}:
        op.create_index(INDEX, "registry_events", ["previous_digest"], unique=True)


def downgrade() -> None:
    """Let events be written without digests again; those that are there keep theirs."""
    op.drop_index(INDEX, table_name="registry_events")
