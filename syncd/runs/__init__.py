"""Runs: one reconcile from reading to applying, its record in the history, and the queue of the daemon.

`reconciler` does one run with the `options` of their table and sends its plan through the `passes`; `factory`
makes its sources and target from the configuration. `lock` allows one writer at a time, `history` records
runs and what they observe, and `queue` runs them one after the other.

Open `reconciler` first.
May import: `apply`, `planning`, `customers`, `gateways`, `sources`, `metering`, `config`, `mapping`, `http`,
`state`, `core`.
"""
