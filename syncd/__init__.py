"""syncd: reconciles Kong consumers and Dev Portal applications into customers of a metering API.

Each folder is a room; its `__init__` names what it is for, what it may import and which file to open first.
"""

__version__ = "0.1.0"
