"""Checks of connectivity, permissions and configuration.

Start with `checkup`.
May import: `audit`, `runs`, `gateways`, `sources`, `metering`.
"""
