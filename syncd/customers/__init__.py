"""Customers as the latest run observed them, with the names behind their subjects, for pages to search.

`known` has the values, and brings them up to date with the changes that a run has made, so that no page has
to ask the metering API for all customers; `directory` keeps them in the state.

Open `directory` first.
May import: `state`, `core`.
"""
