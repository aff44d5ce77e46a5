"""syncd: reconciles Kong consumers and Dev Portal applications into customers of a metering API."""

from openmeter_plugin import __version__ as __version__  # one source for the version: both are released together
