"""The audit: compares the gateways' ledgers with the meters.

Start with `run`; `compare` is its pure core.
May import: `runs`, `gateways`, `metering`.
"""
