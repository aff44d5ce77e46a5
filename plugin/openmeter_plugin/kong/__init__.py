"""Kong's plugin protocol: connections, messages, and the worker process that serves them.

Start with `server`, then `worker`.
May import: `http_log`, `instances`, `process`, `metering`, `spool`.
"""
