"""Tables of the state, each topic's in a block of its own.

Until 0.1.0 is released, a new table or column also goes into revision 0001 (`migrations/versions`); after
that, into a new revision, and `REVISION` names the newest. Tests compare the two.

Times are texts in ISO 8601, in UTC: SQLite has no type for them, and they sort by time.
"""

from __future__ import annotations

import re

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Dialect,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    TypeDecorator,
)
from sqlalchemy import Text as _Text

REVISION = "0001"
"""The revision that this version reads and writes."""

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "ix": "ix_%(table_name)s_%(column_0_name)s",
    }
)

_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")


class Text(TypeDecorator[str]):
    """Text of any origin: what a database cannot hold becomes U+FFFD.

    PostgreSQL has no NUL in texts, neither database has half of a surrogate pair, and a metering API may
    answer with both.
    """

    impl = _Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:  # noqa: ARG002
        """Return the text as it is stored."""
        return storable(value) if value else value


def storable(text: str) -> str:
    """Return a text as a column of type `Text` keeps it."""
    if text.isascii() and "\x00" not in text:
        return text  # 0.1 us instead of 1.6 us, for each of a hundred thousand rows of a day
    return _UNSTORABLE.sub("\ufffd", text)


# SQLite only numbers a column of type INTEGER by itself.
Number = BigInteger().with_variant(Integer(), "sqlite")


# Usage by day (syncd.usage.store)

_DAYS_OF_A_MONTH = range(1, 32)
usage_values = Table(
    "usage_values",
    metadata,
    Column("meter", Text, primary_key=True),
    Column("month", Integer, primary_key=True, autoincrement=False),
    Column("subject", Text, primary_key=True),
    Column("labels", Text, primary_key=True),
    *(Column(f"d{day}", Double, nullable=False, server_default="0") for day in _DAYS_OF_A_MONTH),
    sqlite_with_rowid=False,
)
"""A row for a month of a subject and values of dimensions, with a column for each day of the month.

`month` is 202611. Ninety days of 30,000 subjects are 180,000 rows instead of five million, and any range of
days is added up by the database, in the order of the key.
"""
usage_days = Table(
    "usage_days",
    metadata,
    Column("meter", Text, primary_key=True),
    Column("day", Text, primary_key=True),
    Column("total", Double, nullable=False),
    Column("reported", Double, nullable=False),
    Column("fetched_at", Text, nullable=False),
    sqlite_with_rowid=False,
)
usage_late = Table(
    "usage_late",
    metadata,
    Column("meter", Text, primary_key=True),
    Column("day", Text, primary_key=True),
    Column("subject", Text, primary_key=True),
    Column("seen_at", Text, primary_key=True),
    Column("value", Double, nullable=False),
    sqlite_with_rowid=False,
)
usage_meters = Table(
    "usage_meters",
    metadata,
    Column("meter", Text, primary_key=True),
    Column("dimensions", Text, nullable=False),
    Column("since", Text),
    Column("refreshed_at", Text),
    Column("problem", Text),
    sqlite_with_rowid=False,
)
usage_refreshes = Table(
    "usage_refreshes",
    metadata,
    Column("number", Number, primary_key=True, autoincrement=True),
    Column("started_at", Text, nullable=False),
    Column("finished_at", Text, nullable=False),
    Column("days", Integer, nullable=False),
    Column("remaining", Integer, nullable=False),
    Column("problem", Text),
)


LOCAL = "local"
"""Key of `Table.info`: set for a table about running processes, which `syncd state migrate` does not copy."""


# Leases (syncd.state.lease), and runs that were requested (syncd.runs.queue)

leases = Table(
    "leases",
    metadata,
    Column("name", Text, primary_key=True),
    Column("term", BigInteger, nullable=False),
    Column("holder", Text, nullable=False),
    Column("since", Text, nullable=False),
    Column("released", Boolean, nullable=False),
    sqlite_with_rowid=False,
    info={LOCAL: True},
)
requested_runs = Table(
    "requested_runs",
    metadata,
    Column("number", Number, primary_key=True, autoincrement=True),
    Column("id", Text, nullable=False, unique=True),
    Column("summary", Text, nullable=False),
    Column("options", LargeBinary, nullable=False),
    Column("term", BigInteger),
    info={LOCAL: True},
)

# History of runs (syncd.runs.history)

plans = Table(
    "plans",
    metadata,
    Column("hash", Text, primary_key=True),
    Column("document", LargeBinary, nullable=False),
)
runs = Table(
    "runs",
    metadata,
    Column("number", Number, primary_key=True, autoincrement=True),
    Column("id", Text, nullable=False, unique=True),
    Column("requested_at", Text, nullable=False),
    Column("finished_at", Text),
    Column("dry_run", Boolean, nullable=False),
    Column("state", Text, nullable=False),
    Column("plan", Text, ForeignKey("plans.hash")),
    Column("document", Text, nullable=False),
    Index("ix_runs_requested_at", "requested_at"),
    Index("ix_runs_plan", "plan"),
)
changes = Table(
    "changes",
    metadata,
    Column("run", Text, ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("at", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("customer_key", Text, index=True),
    Column("status", Text, nullable=False),
    Column("document", Text, nullable=False),
    sqlite_with_rowid=False,
)
begun = Table(
    "begun",
    metadata,
    Column("run", Text, ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True),
    Column("change", Text, primary_key=True),
    Column("at", Text, nullable=False),
    Column("document", Text, nullable=False),
    sqlite_with_rowid=False,
)
refused_deletions = Table(
    "refused_deletions",
    metadata,
    Column("customer", Text, primary_key=True),
    Column("state", Text, nullable=False),
    Column("at", Text, nullable=False),
    Column("reason", Text, nullable=False),
    sqlite_with_rowid=False,
)


# Customers as the latest run observed them (syncd.customers.directory)

directory = Table(
    "directory",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("version", Integer, nullable=False),
    Column("digest", Text, nullable=False),
    Column("at", Text, nullable=False),
)
known_customers = Table(
    "known_customers",
    metadata,
    Column("id", Text, primary_key=True),
    Column("key", Text, index=True),
    Column("name", Text, nullable=False),
    Column("subjects", Text, nullable=False),
    Column("keeper", Text, nullable=False),
    Column("owner", Text),
    Column("subscription", Text),
    Column("words", Text, nullable=False),
)
known_names = Table(
    "known_names",
    metadata,
    Column("subject", Text, primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("kind", Text, nullable=False),
    Column("id", Text, nullable=False),
    Column("username", Text),
    Column("custom_id", Text),
    Column("tags", Text, nullable=False),
    Column("source", Text, nullable=False),
    Column("words", Text, nullable=False),
    sqlite_with_rowid=False,
)
known_concerns = Table(
    "known_concerns",
    metadata,
    Column("customer_key", Text, primary_key=True),
    Column("subject", Text, primary_key=True),
    Column("blocked", Boolean, nullable=False),
    Column("reason", Text, nullable=False),
    Column("events", Double, nullable=False),
    Column("tokens", Double, nullable=False),
    sqlite_with_rowid=False,
)


# Notifications that were sent (syncd.notify.store)

notices = Table(
    "notices",
    metadata,
    Column("topic", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("sent_at", Text, nullable=False),
    Column("figure", BigInteger, nullable=False),
    Column("text", Text, nullable=False),
    sqlite_with_rowid=False,
)


# Subjects that people ignore in the dashboard (syncd.runs.unbilled)

ignored_subjects = Table(
    "ignored_subjects",
    metadata,
    Column("number", Number, primary_key=True, autoincrement=True),
    Column("subject", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("ignored_by", Text, nullable=False),
    Column("until", Text),
    Column("since", Text, nullable=False),
    Column("ended_at", Text),
    Column("ended_by", Text),
)


# Closed months (syncd.close.store)

closed_months = Table(
    "closed_months",
    metadata,
    Column("month", Text, primary_key=True),
    Column("revision", Integer, primary_key=True, autoincrement=False),
    Column("sha256", Text, nullable=False),
    Column("closed_at", Text, nullable=False),
    Column("closed_by", Text),
    Column("checked_at", Text),
    Column("late", Text, nullable=False),
    Column("document", LargeBinary, nullable=False),
)
