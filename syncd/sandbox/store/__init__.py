"""The sandbox's data and its rules: SQL and plain functions, no HTTP."""
