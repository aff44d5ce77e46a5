"""The metering API, dialect by dialect: customers, subjects, meters, usage, deletions.

Start with `base`, then `v1` or `v3`.
May import: `http`, `core`.
"""
