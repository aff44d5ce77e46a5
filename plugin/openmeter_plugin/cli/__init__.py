"""The command line `openmeter-plugin`.

Start with `main`.
May import: every room.
"""
