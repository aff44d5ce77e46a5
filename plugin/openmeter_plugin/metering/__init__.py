"""Pure core: from one of Kong's request logs to its CloudEvents, or to the reason why there are none.

Start with `event`; `subject` decides who pays, `rules` holds what the configuration decides.
May import: `spool` (the record format).
"""
