"""What runs and what was said: runs with their leases, the steps they finished, and alerts."""

import sqlalchemy as sa
from alembic import op

from calling_ai.store.revisions.tools import make_table, remove_table, text, time

revision, down_revision = "0003", "0002"
branch_labels = depends_on = None

TABLES = ("runs", "run_steps", "alerts")


def texts(names: str, nullable: bool = False) -> list[sa.Column]:
    """Return columns of texts."""
    return [sa.Column(name, text(), nullable=nullable) for name in names.split()]


def times(names: str, nullable: bool = False) -> list[sa.Column]:
    """Return columns of moments."""
    return [sa.Column(name, time(), nullable=nullable) for name in names.split()]


def upgrade() -> None:
    """Create the tables, or give those that were set aside their names back."""
    make_table(
        "runs",
        *texts("key kind period state owner"),
        sa.Column("attempt", sa.Integer(), nullable=False),
        *times("started_at heartbeat_at lease_until"),
        *times("finished_at", nullable=True),
        *texts("reason", nullable=True),
        sa.Column("result", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("key", name="pk_runs"),
        sa.CheckConstraint(
            "state IN ('running', 'done', 'failed', 'crashed', 'interrupted', 'skipped')", name="ck_runs_state"
        ),
    )
    make_table(
        "run_steps",
        *texts("run_key name digest"),
        *times("finished_at"),
        sa.Column("record", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("run_key", "name", name="pk_run_steps"),
    )
    if make_table(
        "alerts",
        sa.Column("number", sa.Integer(), nullable=False),
        *texts("key severity title text"),
        *texts("report command subject", nullable=True),
        sa.Column("count", sa.Integer(), nullable=False),
        *times("first_at last_at"),
        *times("sent_at closed_at", nullable=True),
        sa.Column("facts", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("number", name="pk_alerts"),
        sa.CheckConstraint("severity IN ('info', 'warning', 'critical')", name="ck_alerts_severity"),
    ):
        still_open = sa.text("closed_at IS NULL")
        op.create_index(
            "uq_alerts_open", "alerts", ["key"], unique=True, sqlite_where=still_open, postgresql_where=still_open
        )


def downgrade() -> None:
    """Remove the tables; those with rows are set aside."""
    for table in TABLES:
        remove_table(table)
