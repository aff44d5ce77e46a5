"""Settings for all tests."""

from __future__ import annotations

import signal

from hypothesis import HealthCheck, settings

# A machine that is busy must not decide a verdict, and the same commit must always get the same one.
# To look for what these examples do not show: pytest --hypothesis-profile default
settings.register_profile(
    "project", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("project")

# A shell starts background jobs with SIGINT ignored, and every child would inherit that: `make test &` would
# test commands that no Ctrl-C reaches.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
