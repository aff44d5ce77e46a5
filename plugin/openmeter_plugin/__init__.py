"""The Kong plugin `openmeter`: bills each request that Kong serves as CloudEvents, exactly once.

Start with `metering/event.py` for what is billed, and with `cli/main.py` for the processes.
"""

__version__ = "0.1.0"
