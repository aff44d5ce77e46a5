"""Carrying out a plan: each change once, and only on what syncd owns.

Start with `executor`.
May import: `planning`, `metering`, `core`.
"""
