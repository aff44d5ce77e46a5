"""Usage: by day, subject and dimensions, and what it adds up to for finance.

`days` are the ranges that people choose, `figures` compares customers with the period before.

Open `figures` first. May import: `runs`, `metering`, `config`, `core`.
"""
