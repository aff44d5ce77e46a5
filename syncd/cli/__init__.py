"""The command line `syncd`.

Start with `main`.
May import: every room.
"""
