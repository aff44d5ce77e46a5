"""Kong's plugin protocol: connections, messages, and the worker process that serves them.

Start with `worker`, which puts the parts together, then `server`. `kong_pdk` is separate: it is the plugin
for stock kong-pdk.
May import: `instances`, `process`, `config`, `metering`, `spool`.
"""
