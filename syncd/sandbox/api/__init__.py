"""The HTTP side of the sandbox: OpenMeter's paths under /api/v1, its own under /sandbox/v1."""
