"""One run, from reading to its record: reconcile, queue, history, lock.

Start with `reconciler`.
May import: `apply`, `planning`, `sources`, `metering`, `config`.
"""
