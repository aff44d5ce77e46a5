"""Transfer: copies the whole state from one database to another."""

from __future__ import annotations

from sqlalchemy import Connection, Table, func, insert, select, text

from syncd.core.errors import StateError
from syncd.state.database import State
from syncd.state.tables import LOCAL, metadata

_ROWS_AT_ONCE = 500


def copy(source: State, target: State) -> dict[str, int]:
    """Copy all rows in one transaction; return how many, by table.

    Raises StateError if the target has rows already.
    """
    tables = [table for table in metadata.sorted_tables if LOCAL not in table.info]
    with source.reading() as read, target.writing() as write:
        if taken := [table.name for table in tables if write.execute(select(table).limit(1)).first()]:
            raise StateError(
                f"the state {target.where} is not empty ({', '.join(taken)}), so nothing was copied. Give an"
                " empty database, or delete the file"
            )
        copied = {table.name: _copy_rows(table, read, write) for table in tables}
        if target.where.url is not None:
            for table in tables:
                _continue_numbers(table, write)
    return copied


def _copy_rows(table: Table, read: Connection, write: Connection) -> int:
    ordered = select(table).order_by(*table.primary_key)
    rows = read.execute(ordered, execution_options={"yield_per": _ROWS_AT_ONCE}).mappings()
    copied = 0
    for batch in rows.partitions():
        write.execute(insert(table), [dict(row) for row in batch])
        copied += len(batch)
    return copied


def _continue_numbers(table: Table, write: Connection) -> None:
    """Let PostgreSQL number new rows after those that were copied with their numbers."""
    column = table.autoincrement_column
    if column is None:
        return
    sequence = text("SELECT pg_get_serial_sequence(:table, :column)")
    name = write.execute(sequence, {"table": table.name, "column": column.name}).scalar()
    last = write.execute(select(func.max(column))).scalar()
    if name and last:
        write.execute(select(func.setval(name, last)))
