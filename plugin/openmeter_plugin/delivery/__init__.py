"""Delivery: from the spool to the metering API, in a process of its own, each event until it is taken."""
