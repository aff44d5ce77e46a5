"""The configuration: models of syncd.yaml and its environment variables, which check each setting.

Start with `settings`.
May import: `mapping`, `http`, `state`, `core`.
"""
