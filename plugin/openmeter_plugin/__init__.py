"""The Kong plugin `openmeter`: requests that Kong served become CloudEvents, none lost, none counted twice."""

__version__ = "0.1.0"
