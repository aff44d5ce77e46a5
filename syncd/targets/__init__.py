"""Targets: metering APIs behind one interface."""

from syncd.model import NO_DETAILS, CustomerDetails
from syncd.targets.base import CustomerEdit, MeteringTarget, SubjectWrite

__all__ = ["NO_DETAILS", "CustomerDetails", "CustomerEdit", "MeteringTarget", "SubjectWrite"]
