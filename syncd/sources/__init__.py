"""Where principals come from: Kong's Admin API, Konnect, files. Each reads everything or raises.

Start with `base`; each source is one file.
May import: `http`, `core`.
"""
