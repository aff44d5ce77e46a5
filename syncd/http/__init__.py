"""The HTTP client for all APIs: JSON, retries, Retry-After, limits, proxies, complete reads of paged lists.

Start with `client`.
May import: `core`.
"""
