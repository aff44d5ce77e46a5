"""First schema, as 0.1.0 has it; until that is released, new tables are added here."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Create the tables."""
    _create_leases()
    _create_history()
    _create_notices()
    _create_usage()
    _create_directory()
    _create_ignored_subjects()
    _create_closed_months()


def _create_leases() -> None:
    op.create_table(
        "leases",
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("term", sa.BigInteger, nullable=False),
        sa.Column("holder", sa.Text, nullable=False),
        sa.Column("since", sa.Text, nullable=False),
        sa.Column("released", sa.Boolean, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_leases"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "requested_runs",
        sa.Column("number", _NUMBER, nullable=False, autoincrement=True),
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("summary", sa.Text, nullable=False),
        sa.Column("options", sa.LargeBinary, nullable=False),
        sa.Column("term", sa.BigInteger),
        sa.PrimaryKeyConstraint("number", name="pk_requested_runs"),
        sa.UniqueConstraint("id", name="uq_requested_runs_id"),
    )


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
    op.create_index("ix_changes_customer_key", "changes", ["customer_key"])
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


def _create_usage() -> None:
    days = (sa.Column(f"d{day}", sa.Double, nullable=False, server_default="0") for day in range(1, 32))
    op.create_table(
        "usage_values",
        sa.Column("meter", sa.Text, nullable=False),
        sa.Column("month", sa.Integer, nullable=False, autoincrement=False),
        sa.Column("subject", sa.Text, nullable=False),
        sa.Column("labels", sa.Text, nullable=False),
        *days,
        sa.PrimaryKeyConstraint("meter", "month", "subject", "labels", name="pk_usage_values"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "usage_days",
        sa.Column("meter", sa.Text, nullable=False),
        sa.Column("day", sa.Text, nullable=False),
        sa.Column("total", sa.Double, nullable=False),
        sa.Column("reported", sa.Double, nullable=False),
        sa.Column("fetched_at", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("meter", "day", name="pk_usage_days"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "usage_late",
        sa.Column("meter", sa.Text, nullable=False),
        sa.Column("day", sa.Text, nullable=False),
        sa.Column("subject", sa.Text, nullable=False),
        sa.Column("seen_at", sa.Text, nullable=False),
        sa.Column("value", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("meter", "day", "subject", "seen_at", name="pk_usage_late"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "usage_meters",
        sa.Column("meter", sa.Text, nullable=False),
        sa.Column("dimensions", sa.Text, nullable=False),
        sa.Column("since", sa.Text),
        sa.Column("refreshed_at", sa.Text),
        sa.Column("problem", sa.Text),
        sa.PrimaryKeyConstraint("meter", name="pk_usage_meters"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "usage_refreshes",
        sa.Column("number", _NUMBER, nullable=False, autoincrement=True),
        sa.Column("started_at", sa.Text, nullable=False),
        sa.Column("finished_at", sa.Text, nullable=False),
        sa.Column("days", sa.Integer, nullable=False),
        sa.Column("remaining", sa.Integer, nullable=False),
        sa.Column("problem", sa.Text),
        sa.PrimaryKeyConstraint("number", name="pk_usage_refreshes"),
    )


def _create_directory() -> None:
    op.create_table(
        "directory",
        sa.Column("number", sa.Integer, nullable=False, autoincrement=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("digest", sa.Text, nullable=False),
        sa.Column("at", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("number", name="pk_directory"),
    )
    op.create_table(
        "known_customers",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("key", sa.Text),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("subjects", sa.Text, nullable=False),
        sa.Column("keeper", sa.Text, nullable=False),
        sa.Column("owner", sa.Text),
        sa.Column("subscription", sa.Text),
        sa.Column("words", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_known_customers"),
    )
    op.create_index("ix_known_customers_key", "known_customers", ["key"])
    op.create_table(
        "known_names",
        sa.Column("subject", sa.Text, nullable=False),
        sa.Column("number", sa.Integer, nullable=False, autoincrement=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("username", sa.Text),
        sa.Column("custom_id", sa.Text),
        sa.Column("tags", sa.Text, nullable=False),
        sa.Column("source", sa.Text, nullable=False),
        sa.Column("words", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("subject", "number", name="pk_known_names"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "known_concerns",
        sa.Column("customer_key", sa.Text, nullable=False),
        sa.Column("subject", sa.Text, nullable=False),
        sa.Column("blocked", sa.Boolean, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("events", sa.Double, nullable=False),
        sa.Column("tokens", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("customer_key", "subject", name="pk_known_concerns"),
        sqlite_with_rowid=False,
    )


def _create_notices() -> None:
    op.create_table(
        "notices",
        sa.Column("topic", sa.Text, nullable=False),
        sa.Column("key", sa.Text, nullable=False),
        sa.Column("sent_at", sa.Text, nullable=False),
        sa.Column("figure", sa.BigInteger, nullable=False),
        sa.Column("text", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("topic", "key", name="pk_notices"),
        sqlite_with_rowid=False,
    )


def _create_ignored_subjects() -> None:
    op.create_table(
        "ignored_subjects",
        sa.Column("number", _NUMBER, nullable=False, autoincrement=True),
        sa.Column("subject", sa.Text, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("ignored_by", sa.Text, nullable=False),
        sa.Column("until", sa.Text),
        sa.Column("since", sa.Text, nullable=False),
        sa.Column("ended_at", sa.Text),
        sa.Column("ended_by", sa.Text),
        sa.PrimaryKeyConstraint("number", name="pk_ignored_subjects"),
    )


def _create_closed_months() -> None:
    op.create_table(
        "closed_months",
        sa.Column("month", sa.Text, nullable=False),
        sa.Column("revision", sa.Integer, nullable=False, autoincrement=False),
        sa.Column("sha256", sa.Text, nullable=False),
        sa.Column("closed_at", sa.Text, nullable=False),
        sa.Column("closed_by", sa.Text),
        sa.Column("checked_at", sa.Text),
        sa.Column("late", sa.Text, nullable=False),
        sa.Column("document", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("month", "revision", name="pk_closed_months"),
    )
