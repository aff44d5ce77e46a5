"""The http-log receiver: takes the batches that Kong's bundled http-log plugin posts.

Start with `receiver`.
May import: `instances`, `config`, `process`, `metering`, `spool`.
"""
