"""The gate: decides who may still call, from the metering API's entitlements and what is counted locally.

Kong never asks it: Kong reads the decisions from a shared dict that the gate feeds. `accounts` decides,
without I/O; `counts`, `schedule` and `lines` have none either. `service` runs the loops, `client` asks the
metering API, and `process` runs it all, with the socket that Kong and operators use.

Open `accounts` first.
May import: `books`, `process`, `config`, `spool`, `network`.
"""
