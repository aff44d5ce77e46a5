"""syncd: reconciles Kong consumers and Dev Portal applications into customers of a metering API."""

# Both packages are released together: one source for their version.
from openmeter_plugin import __version__ as __version__
