"""Processes and sockets: the supervisor, heartbeats, listening sockets, the handoff of connections, systemd.

Start with `supervisor`.
May import: the package root.
"""
