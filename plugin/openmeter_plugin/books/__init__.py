"""The books: a SQLite database of counts: accepted, delivered, dead-lettered, skipped, lost.

The ledger is the part by hour, event type and subject. The delivery process writes the books; the API and
the commands read them through the queries in this room.

Start with `store`; `accountant` fills it from the spool.
May import: `metering`, `spool`.
"""
