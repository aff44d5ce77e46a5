"""The daemon that `syncd run` starts: schedule, HTTP API, metrics, configuration reloads.

Start with `service`, which puts the parts together. `api` has the HTTP routes, `metrics` the Prometheus
metrics, `client` the client that `syncd resync` and `syncd status` use.
May import: `dashboard`, `close`, `notify`, `usage`, `runs`, `customers`, `sources`, `config`, `http`,
`state`, `core`.
"""
