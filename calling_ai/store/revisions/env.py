"""How Alembic runs the steps: in the transaction that `store.migrations` opened, or, for its own command, in one of the workspace."""

import contextlib

from alembic import context
from sqlalchemy.engine import Connection, Engine

from calling_ai.core.settings import settings
from calling_ai.store.database import engine, writing

given = context.config.attributes.get("connection")
with contextlib.ExitStack() as stack:
    if not isinstance(given, Connection):
        database = given if isinstance(given, Engine) else engine(settings().database_url)
        given = stack.enter_context(writing(database, alone="migrate"))
    metadata = context.config.attributes.get("metadata")
    context.configure(connection=given, target_metadata=metadata, transactional_ddl=True, compare_type=True)
    with context.begin_transaction():
        context.run_migrations()
