"""Processes and sockets: the supervisor, heartbeats, listening sockets, systemd, and the connection handoff.

Knows nothing of Kong's protocol or of metering. Start with `supervisor`, then `sockets`.
May import: no other room.
"""
