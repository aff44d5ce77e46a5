"""Sources of principals: Kong's Admin API, Konnect, files. Each reads everything or raises.

Start with `base`, the interface. `kong_admin` and `konnect` read APIs, `files` what needs no network.
May import: `http`, `core`.
"""
