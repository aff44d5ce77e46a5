"""`syncd run`: the schedule, the HTTP API, metrics.

Start with `service`.
May import: `dashboard`, `runs`.
"""
