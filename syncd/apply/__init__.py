"""The executor: applies a plan, each change once and only to customers that syncd manages.

`executor` decides the order, `edits` what each change writes, `pool` runs several changes concurrently.

Open `executor` first.
May import: `planning`, `metering`, `core`.
"""
