"""The scope of a run: only the changes of some principals, and never a removal.

All sources are still read in full. Otherwise shared subjects, keys in use and group members would be
unknown, and a scoped run would reach a different state from a full one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from syncd.core.changes import REMOVALS, Change, ChangeKind, Plan
from syncd.core.errors import ScopeError
from syncd.core.model import Principal
from syncd.mapping.desired_state import desired_state
from syncd.mapping.rules import MappingRules


@dataclass(frozen=True, slots=True)
class Scope:
    """Selects principals by source (its name in messages), by id, username or custom_id, or by both."""

    source: str | None = None
    principal: str | None = None

    @property
    def whole(self) -> bool:
        """Return whether all principals are selected."""
        return self.source is None and self.principal is None

    def select(self, principals: Iterable[Principal]) -> list[Principal]:
        """Return the selected principals; raises ScopeError if there are none."""
        principals = list(principals)
        found = [
            principal
            for principal in principals
            if (self.source is None or self._named(principal.source))
            and (
                self.principal is None
                or self.principal in (principal.id, principal.username, principal.custom_id)
            )
        ]
        if not found:
            what = [f"source {self.source}"] * (self.source is not None)
            what += [f"principal {self.principal}"] * (self.principal is not None)
            sources = sorted({principal.source.partition(" ")[0] for principal in principals})
            known = f". The sources with principals: {', '.join(sources)}" if self.source and sources else ""
            raise ScopeError(f"no principal matches {' and '.join(what)}{known}")
        return found

    def _named(self, source: str) -> bool:
        return self.source is not None and (source == self.source or source.startswith(f"{self.source} "))


def restricted(plan: Plan, scope: Scope, principals: Sequence[Principal], rules: MappingRules) -> Plan:
    """Return the plan with only the changes of the selected principals."""
    if scope.whole:
        return plan
    wanted = desired_state(scope.select(principals), rules)
    subjects = {subject.key for customer in wanted.customers for subject in customer.subjects}
    subjects |= {key for problem in wanted.problems for key in problem.subject_keys}
    # A principal that gets no subject at all is recognized by the reason of its problem.
    reasons = {problem.reason for problem in wanted.problems}
    customers = {customer.key for customer in wanted.customers}

    def concerns(change: Change) -> bool:
        if change.kind in REMOVALS or change.kind is ChangeKind.ORPHANED:
            return False
        if change.subject_keys:
            return not subjects.isdisjoint(change.subject_keys)
        return change.customer_key in customers or change.reason in reasons

    note = "limited to the selected principals; nothing is marked, detached or deleted"
    return replace(plan, changes=tuple(filter(concerns, plan.changes)), notes=(*plan.notes, note))
