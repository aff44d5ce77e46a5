"""What can be asked of Kong beside the log. Each question costs the gateway a round trip."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import Final


class NotQueried(Enum):
    """The type of NOT_QUERIED, which stands for an answer as long as the question was not asked."""

    NOT_QUERIED = "not_queried"


NOT_QUERIED: Final = NotQueried.NOT_QUERIED


class PdkQuery(Enum):
    """What must be asked of Kong before the outcome is known; the values are fields of `Answers`."""

    APPLICATION = "application"
    CAPTURES = "captures"


@dataclass(frozen=True, slots=True)
class QueryResults:
    """What Kong has answered so far, as the PDK returns it, whatever that is; None where it has nothing.

    `application` is `kong.ctx.shared.kaa_application_context`; `captures` is what
    `kong.request.get_uri_captures` returns, `{"named": {name: text}}`.
    """

    application: object = NOT_QUERIED
    captures: object = NOT_QUERIED

    def with_result(self, need: PdkQuery, answer: object) -> QueryResults:
        """Return these answers and one more."""
        return replace(self, **{need.value: answer})

    def completed(self) -> QueryResults:
        """Return these answers, with none for each question that was not answered."""
        return QueryResults(
            None if self.application is NOT_QUERIED else self.application,
            None if self.captures is NOT_QUERIED else self.captures,
        )


NO_RESULTS: Final = QueryResults()
