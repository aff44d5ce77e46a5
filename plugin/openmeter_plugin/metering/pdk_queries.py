"""PDK queries: what the plugin server can ask Kong besides the log. Each costs the gateway a round trip."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import Final


class NotQueried(Enum):
    """The type of NOT_QUERIED, the placeholder for the result of a query that was not made yet."""

    NOT_QUERIED = "not_queried"


NOT_QUERIED: Final = NotQueried.NOT_QUERIED


class PdkQuery(Enum):
    """A query that must be made before the decision; the values are fields of `QueryResults`."""

    APPLICATION = "application"
    CAPTURES = "captures"


@dataclass(frozen=True, slots=True)
class QueryResults:
    """Kong's answers so far, as the PDK returns them, of any JSON type; None if Kong has no such value.

    `application` is `kong.ctx.shared.kaa_application_context`; `captures` is what
    `kong.request.get_uri_captures` returns, `{"named": {name: text}}`.
    """

    application: object = NOT_QUERIED
    captures: object = NOT_QUERIED

    def with_result(self, query: PdkQuery, result: object) -> QueryResults:
        """Return these results and one more."""
        return replace(self, **{query.value: result})

    def completed(self) -> QueryResults:
        """Return these results, with None for each query that was not made."""
        return QueryResults(
            None if self.application is NOT_QUERIED else self.application,
            None if self.captures is NOT_QUERIED else self.captures,
        )


NO_RESULTS: Final = QueryResults()
