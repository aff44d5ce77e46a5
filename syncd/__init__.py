"""syncd: Kong consumers and Dev Portal applications become customers and subjects of a metering API."""

__version__ = "0.1.0"
