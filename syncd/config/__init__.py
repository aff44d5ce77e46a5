"""The configuration: models of syncd.yaml and its environment variables, which check each setting.

Start with `settings`, which has the whole and the section `metering`; `sources`, `mapping` and `prices` have
sections of their own, and `sections` all others.
May import: `mapping`, `http`, `state`, `core`.
"""
