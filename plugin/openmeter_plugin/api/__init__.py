"""The operations API of a running plugin server: health, metrics, dead letters, the ledger.

Open `app` first: it has the routes. `access` guards them, `runtime` starts them in the delivery process.
May import: `segments`, `delivery`, `books`, `process`, `metering`, `spool`.
"""
