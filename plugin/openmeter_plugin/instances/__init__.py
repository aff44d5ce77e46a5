"""Plugin instances: which configuration an id means, in every worker and after a restart, and the record
that it makes of a log.

Start with `instance`.
May import: `config`, `metering`, `spool`.
"""
