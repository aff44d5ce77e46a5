"""The books: everything that is SQL. What was accepted, delivered, refused and lost, and the ledger by hour.

Start with `store`; `accountant` fills it from the spool.
May import: `spool`, `metering`.
"""
