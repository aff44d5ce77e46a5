"""The metering API: customers, subject entities, meters, events, usage, deletions, in each dialect.

Start with `base`, the interface. `v1` and `v3` implement it, each alone knowing the paths, fields, pages and
errors of its dialect; `dialects` is the table of both, and `answers` what they check and read alike.
May import: `config`, `http`, `core`.
"""
