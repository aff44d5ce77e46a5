"""Values that every room speaks of: principals, customers, changes, ownership, errors. Pure.

Start with `model`, then `changes`.
May import: nothing.
"""
