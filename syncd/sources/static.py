"""Static subjects: named in the configuration, for usage that does not pass through Kong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from syncd.core.model import Principal


@dataclass(frozen=True, slots=True)
class StaticSubject:
    """A subject by its own key; `customer` is the key of its customer, None for one of its own."""

    key: str
    name: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    customer: str | None = None


@dataclass(frozen=True, slots=True)
class Static:
    """The subjects of one ``type: static`` entry."""

    subjects: tuple[StaticSubject, ...]
    name: str = "static"

    def fingerprint(self) -> None:
        """Return None: reading costs nothing."""

    def read(self) -> Sequence[Principal]:
        """Return the subjects as principals."""
        return [
            Principal(
                kind="static",
                id=subject.key,
                source=self.name,
                username=subject.name,
                metadata=subject.metadata,
                customer=subject.customer,
            )
            for subject in self.subjects
        ]
