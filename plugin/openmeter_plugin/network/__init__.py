"""What the HTTP clients of both packages share: proxies, TLS settings, connections that are safe to reuse.

It sends nothing itself; the clients are `delivery.client` and `syncd.http`. Start with `proxies`.
May import: no other room.
"""
