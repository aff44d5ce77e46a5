"""The HTTP side of the sandbox: OpenMeter's paths under /api/v1 and /api/v3, its own under /sandbox/v1."""
