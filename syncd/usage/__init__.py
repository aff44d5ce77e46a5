"""Usage: by day, subject and dimensions, and what it adds up to for finance.

`refresh` fetches from the metering API what has changed; `store` keeps it in the state and reads it for
ranges of `days`. `figures` compares customers with the period before, `estimates` says what usage is worth by
the prices of the configuration.

Open `store` first.
May import: `runs`, `customers`, `metering`, `config`, `state`, `core`.
"""
