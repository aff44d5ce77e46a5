"""One HTTP client for all APIs: bounded answers, retries, pace, pagination.

Start with `client`.
May import: `core`.
"""
