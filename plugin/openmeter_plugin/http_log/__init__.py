"""The http-log input: receives the batches that Kong's bundled http-log plugin posts.

Start with `receiver`. `splitter` and `scanner` take a post's body apart, `spooling` writes its records, and
`config` has the settings.
May import: `instances`, `config`, `process`, `metering`, `spool`.
"""
