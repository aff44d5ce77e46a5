"""First schema, as 0.1.0 has it; until that is released, new tables are added here."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Create the tables."""
    _create_history()


def _create_history() -> None:
    op.create_table(
        "plans",
        sa.Column("hash", sa.Text, nullable=False),
        sa.Column("document", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("hash", name="pk_plans"),
    )
    op.create_table(
        "runs",
        sa.Column("number", _NUMBER, nullable=False, autoincrement=True),
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("requested_at", sa.Text, nullable=False),
        sa.Column("finished_at", sa.Text),
        sa.Column("dry_run", sa.Boolean, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("plan", sa.Text),
        sa.Column("document", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("number", name="pk_runs"),
        sa.UniqueConstraint("id", name="uq_runs_id"),
        sa.ForeignKeyConstraint(["plan"], ["plans.hash"], name="fk_runs_plan"),
    )
    op.create_index("ix_runs_requested_at", "runs", ["requested_at"])
    op.create_index("ix_runs_plan", "runs", ["plan"])
    op.create_table(
        "changes",
        sa.Column("run", sa.Text, nullable=False),
        sa.Column("number", sa.Integer, nullable=False, autoincrement=False),
        sa.Column("at", sa.Text, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("customer_key", sa.Text),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("document", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("run", "number", name="pk_changes"),
        sa.ForeignKeyConstraint(["run"], ["runs.id"], name="fk_changes_run", ondelete="CASCADE"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "begun",
        sa.Column("run", sa.Text, nullable=False),
        sa.Column("change", sa.Text, nullable=False),
        sa.Column("at", sa.Text, nullable=False),
        sa.Column("document", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("run", "change", name="pk_begun"),
        sa.ForeignKeyConstraint(["run"], ["runs.id"], name="fk_begun_run", ondelete="CASCADE"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "refused_deletions",
        sa.Column("customer", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("at", sa.Text, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("customer", name="pk_refused_deletions"),
        sqlite_with_rowid=False,
    )
