"""The http-log input: receives the batches that Kong's bundled http-log plugin posts.

Start with `receiver`, which splits a post's body into logs. `spooling` writes their records, `process` runs
the receiver in a process of its own, and `config` has the settings.
May import: `instances`, `process`, `config`, `metering`, `spool`.
"""
