"""The pages that the daemon serves below /dashboard, rendered here, readable without scripts.

Start with `pages` (what is shown) and `views` (how it is said).
May import: `runs`, `gateways`, `sources`, `metering`.
"""
