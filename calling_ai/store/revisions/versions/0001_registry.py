"""The registry: versions, aliases, and events that are only ever added; a database made without migrations is adopted."""

import sqlalchemy as sa

from calling_ai.store.revisions.tools import make_table, protect, release, remove_table, time

revision, down_revision = "0001", None
branch_labels = depends_on = None


def upgrade() -> None:
    """Create the tables, or adopt those that `Registry` made."""
    make_table(
        "versions",
        sa.Column("number", sa.Integer(), nullable=False),
        *(
            sa.Column(name, sa.Text(), nullable=False)
            for name in ("model", "version", "source", "status", "digest", "snapshot_digest")
        ),
        *(sa.Column(name, sa.Integer(), nullable=False) for name in ("major", "minor", "size")),
        *(
            sa.Column(name, sa.JSON(), nullable=False)
            for name in ("metrics", "notebook_digests", "parameters", "seeds", "environment")
        ),
        sa.Column("parent", sa.Text()),
        sa.Column("created_at", time(), nullable=False),
        sa.PrimaryKeyConstraint("number", name="pk_versions"),
        sa.UniqueConstraint("model", "version", name="uq_versions_model_version"),
        sa.UniqueConstraint("model", "major", "minor", name="uq_versions_model_major_minor"),
        sa.CheckConstraint("status IN ('staging', 'active', 'deprecated', 'archived')", name="ck_versions_status"),
    )
    make_table(
        "aliases",
        *(sa.Column(name, sa.Text(), nullable=False) for name in ("model", "alias", "version")),
        sa.PrimaryKeyConstraint("model", "alias", name="pk_aliases"),
        sa.ForeignKeyConstraint(
            ["model", "version"], ["versions.model", "versions.version"], name="fk_aliases_model_version"
        ),
    )
    make_table(
        "registry_events",
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("at", time(), nullable=False),
        *(sa.Column(name, sa.Text(), nullable=False) for name in ("action", "model", "subject", "actor")),
        *(sa.Column(name, sa.Text()) for name in ("before", "after", "digest", "previous_digest")),
        sa.Column("evidence", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("number", name="pk_registry_events"),
    )
    protect("registry_events", words="events are only ever added")


def downgrade() -> None:
    """Remove the tables; those with rows are set aside."""
    release("registry_events")
    for table in ("registry_events", "aliases", "versions"):
        remove_table(table)
