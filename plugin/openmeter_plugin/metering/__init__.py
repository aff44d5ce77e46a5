"""The billing rules, without I/O: turn one request log of Kong into CloudEvents or a skip reason.

Open `event` first: `decide` is the entry point. `subject` finds who pays, `rules` holds the compiled
configuration, `fast_path` is a shortcut for ordinary requests.
May import: `spool` (the record format).
"""
