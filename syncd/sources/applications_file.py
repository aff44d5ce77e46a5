"""Dev Portal applications from a file of the shape that Konnect lists them in.

``GET /v3/portals/{portalId}/applications`` answers ``{"data": [...], "meta": {"page": {"total": n}}}``
(konnect-portal-management-v3.yaml, ListApplicationsResponse). A file with fewer applications than
`total` is one page of several, hence an error.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from syncd.errors import SourceError
from syncd.model import Principal
from syncd.sources.base import text


@dataclass(frozen=True, slots=True)
class ApplicationsFile:
    """A JSON file with the applications of a portal."""

    path: Path

    @property
    def name(self) -> str:
        """What messages call this source."""
        return f"applications-file {self.path.name}"

    def read(self) -> Sequence[Principal]:
        """Return the applications."""
        document = self._document()
        listed = document.get("data")
        if not isinstance(listed, list):
            raise SourceError(self.name, f"{self.path} has no list `data`, as Konnect's answer has")
        principals = [self._principal(item, index) for index, item in enumerate(listed)]
        self._require_complete(document.get("meta"), len({principal.id for principal in principals}))
        return principals

    def _document(self) -> dict[str, object]:
        try:
            document = json.loads(self.path.read_bytes())
        except OSError as error:
            raise SourceError(self.name, f"cannot read {self.path}: {error.strerror}") from None
        except ValueError as error:
            raise SourceError(self.name, f"{self.path} is not JSON: {error}") from None
        if not isinstance(document, dict):
            raise SourceError(self.name, f"{self.path} is not a JSON object")
        return document

    def _require_complete(self, meta: object, found: int) -> None:
        page = meta.get("page") if isinstance(meta, dict) else None
        total = page.get("total") if isinstance(page, dict) else None
        if isinstance(total, int | float) and total > found:
            raise SourceError(
                self.name,
                f"{self.path} has {found} of {int(total)} applications (meta.page.total);"
                " put all pages into `data`",
            )

    def _principal(self, item: object, index: int) -> Principal:
        what = f"data[{index}]"
        if not isinstance(item, dict):
            raise SourceError(self.name, f"{what} is not an object")
        identity = text(item, "id", self.name, what)
        if identity is None:
            raise SourceError(self.name, f"{what} has no id")
        return Principal(
            kind="application",
            id=identity,
            source=self.name,
            username=text(item, "name", self.name, f"application {identity}"),
        )
