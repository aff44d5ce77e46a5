"""Revisions of the schema, applied by Alembic (`syncd.state.database`)."""
