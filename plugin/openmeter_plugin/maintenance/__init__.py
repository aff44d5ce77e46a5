"""Offline tools for a spool: verify it, export it, replay its quarantine.

Start with `verify`.
May import: `delivery`, `books`, `instances`, `config`, `metering`, `spool`.
"""
