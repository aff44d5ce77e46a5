"""Record of what runs observe, for the pages: customers, and the names behind their subjects."""

from __future__ import annotations

from syncd.customers.directory import Directory
from syncd.mapping.claims import subjects_of
from syncd.mapping.rules import MappingRules
from syncd.runs.passes import BothSides
from syncd.runs.run import Run, RunObserver


class DirectoryRecorder(RunObserver):
    """Keeps the directory up to date.

    A run that only previews what an option would do says nothing about the concerns of customers now.
    """

    def __init__(self, directory: Directory) -> None:
        self._directory = directory

    def observed(self, run: Run, read: BothSides, rules: MappingRules) -> None:
        """Keep all customers, and the principals behind the subjects."""
        subjects = subjects_of(read.principals, rules)
        at = run.started_at or run.requested_at
        self._directory.observe(read.observed.customers, subjects, rules.owner_id, at)

    def finished(self, run: Run) -> None:
        """Keep what the run made of them, and their concerns."""
        if run.plan is None or not run.options.scope.whole:
            return
        if run.dry_run and (run.options.adopt or run.options.allow_move):
            return
        self._directory.settle(run.plan, run.outcomes, run.unbilled)
