"""Settings for all tests."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# A machine that is busy must not decide a verdict, and the same commit must always get the same one.
# To look for what these examples do not show: pytest --hypothesis-profile default
settings.register_profile(
    "project", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("project")
