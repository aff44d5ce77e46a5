"""The gate: decisions, schedule, feed, process."""
