"""The scenarios, in the order in which they run. Each ends, or raises Differs or NotOffered."""

from collections.abc import Callable, Sequence

from tests.conformity.scenarios import deletions, events, first_sync, refusals
from tests.conformity.stage import Stage

SCENARIOS: Sequence[Callable[[Stage], None]] = (
    *first_sync.SCENARIOS,
    *refusals.SCENARIOS,
    *deletions.SCENARIOS,
    *events.SCENARIOS,
)


def title(scenario: Callable[[Stage], None]) -> str:
    """Return a scenario's name as a sentence."""
    return scenario.__name__.replace("_", " ")
