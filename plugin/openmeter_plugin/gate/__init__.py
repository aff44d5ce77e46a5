"""The gate: decides who may still call, from the metering API's entitlements and what is counted locally.

Kong never asks it: Kong reads the decisions from a shared dict that the gate feeds. `accounts.py` decides,
without I/O, and is the file to read first; `counts.py`, `schedule.py` and `lines.py` have none either. May
import `books` and what is below it; `api` and `cli` start and show it.
"""
