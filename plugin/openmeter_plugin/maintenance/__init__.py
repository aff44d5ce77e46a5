"""Offline tools for a spool: verify it, export its events, replay its quarantine.

Open `verify` first: it shows how the books and the segments fit together.
May import: `delivery`, `books`, `instances`, `config`, `metering`, `spool`.
"""
