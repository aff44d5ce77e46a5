"""The audit: compares the gateways' ledgers with the meters, and requests redeliveries of missing events.

`run` reads ledgers and meters and repeats, `books` decides which hours of a ledger are final, `compare` finds
differences, and `redelivery` plans and requests redeliveries.
`books` and `compare` are pure.

Open `run` first.
May import: `gateways`, `metering`, `core`.
"""
