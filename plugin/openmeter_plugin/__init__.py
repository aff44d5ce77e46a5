"""The Kong plugin `openmeter`: served requests become CloudEvents, none lost, none counted twice."""

__version__ = "0.1.0"
