"""Delivery: from the spool to the metering API, each event exactly once in effect.

Start with `pipeline`, then `endpoint`.
May import: `books`, `metering`, `spool`.
"""
