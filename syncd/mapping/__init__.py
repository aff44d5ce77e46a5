"""Pure core: from principals to the customers and subjects that should exist.

Start with `desired_state`.
May import: `core`.
"""
