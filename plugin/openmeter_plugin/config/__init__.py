"""The settings that Kong's admin writes: their schema, their checks, and the rules they compile to.

Start with `schema`.
May import: `metering`, `spool`.
"""
