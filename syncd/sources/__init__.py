"""Sources of principals: Kong's Admin API, Konnect, files. Each reads everything or raises.

Start with `base`, the interface; each source is one file.
May import: `http`, `core`.
"""
