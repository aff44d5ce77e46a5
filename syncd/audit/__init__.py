"""The audit: do the gateways' ledgers and the meters agree?

Start with `run`; `compare` is its pure core.
May import: `runs`, `gateways`, `metering`.
"""
