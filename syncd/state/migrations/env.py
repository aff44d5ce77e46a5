"""Environment in which Alembic runs the revisions, in the transaction that `syncd.state` has begun."""

from __future__ import annotations

from alembic import context

from syncd.state.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    transactional_ddl=True,
)
context.run_migrations()
