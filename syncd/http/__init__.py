"""The HTTP client for all APIs: JSON, retries, Retry-After, complete reads of paged lists.

Start with `client`.
May import: `core`.
"""
