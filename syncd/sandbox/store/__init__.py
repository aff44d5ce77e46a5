"""What the sandbox keeps, and its rules: SQL and plain functions, no HTTP."""
