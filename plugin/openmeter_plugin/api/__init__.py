"""The operations API of a running plugin server: health, metrics, dead letters, the ledger.

Open `app` first: it has the routes and serves them. `access` guards them, `runtime` is the delivery process
with the API, which is imported only if it is enabled.
May import: `gate`, `segments`, `delivery`, `books`, `process`, `metering`, `spool`.
"""
