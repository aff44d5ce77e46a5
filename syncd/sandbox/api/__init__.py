"""The sandbox's HTTP routes: OpenMeter's under /api/v1 and /api/v3, its own under /sandbox/v1."""
