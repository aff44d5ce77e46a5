"""The billing rules, without I/O: turn one request log of Kong into CloudEvents or a skip reason.

Open `event` first: `decide` is the entry point, and the only place that decides what is billed. `kong_log`
decodes a log, `subject` finds who pays, `rules` holds the compiled configuration.
May import: no other room.
"""
