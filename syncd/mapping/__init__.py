"""The mapping: a pure function from principals to the desired customers and subjects.

Start with `desired_state`.
May import: `core`.
"""
