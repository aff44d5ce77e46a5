"""The metering API in both dialects: customers, subject entities, meters, usage, deletions.

Start with `base`, the interface; `v1` and `v3` implement it.
May import: `http`, `core`.
"""
