"""Client of the plugin's operations API on each gateway.

Start with `client`.
May import: `config`, `http`, `core`.
"""
