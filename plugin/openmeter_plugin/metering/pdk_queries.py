"""What can be asked of Kong beside the log. Each question costs the gateway a round trip."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import Final


class Unasked(Enum):
    """The type of UNASKED, which stands for an answer as long as the question was not asked."""

    UNASKED = "unasked"


UNASKED: Final = Unasked.UNASKED


class Needs(Enum):
    """What must be asked of Kong before the outcome is known; the values are fields of `Answers`."""

    APPLICATION = "application"
    CAPTURES = "captures"


@dataclass(frozen=True, slots=True)
class Answers:
    """What Kong has answered so far, as the PDK returns it, whatever that is; None where it has nothing.

    `application` is `kong.ctx.shared.kaa_application_context`; `captures` is what
    `kong.request.get_uri_captures` returns, `{"named": {name: text}}`.
    """

    application: object = UNASKED
    captures: object = UNASKED

    def with_answer(self, need: Needs, answer: object) -> Answers:
        """Return these answers and one more."""
        return replace(self, **{need.value: answer})

    def without_the_rest(self) -> Answers:
        """Return these answers, with none for each question that was not answered."""
        return Answers(
            None if self.application is UNASKED else self.application,
            None if self.captures is UNASKED else self.captures,
        )


NOTHING_ASKED: Final = Answers()
