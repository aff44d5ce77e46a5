"""The operations API of a running plugin server: health, metrics, dead letters, the ledger.

Start with `app`.
May import: `delivery`, `books`, `process`, `spool`.
"""
