"""The values that all rooms share: principals, customers, changes, ownership metadata, errors. No I/O.

Start with `model`, then `changes`.
May import: no other room.
"""
