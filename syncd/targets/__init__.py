"""Targets: metering APIs behind one interface."""

from syncd.targets.base import CustomerEdit, MeteringTarget, SubjectWrite

__all__ = ["CustomerEdit", "MeteringTarget", "SubjectWrite"]
