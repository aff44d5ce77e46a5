"""Mapping: principals become desired customers. Pure, but for reading the mapping file.

`world` puts it together: `claims` (which subject, in which customer), `collisions` (what cannot be
told apart is taken out), `details` (what a customer is created with), `limits` (how many subjects).
"""

from syncd.mapping.limits import within_limits
from syncd.mapping.rules import Assignment, GroupBy, MappingRules, SubjectField, Templates
from syncd.mapping.world import desired_world, display_name

__all__ = [
    "Assignment",
    "GroupBy",
    "MappingRules",
    "SubjectField",
    "Templates",
    "desired_world",
    "display_name",
    "within_limits",
]
