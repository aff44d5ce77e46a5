"""The settings of syncd.yaml and the environment.

Start with `settings`.
May import: `mapping`, `core`.
"""
