"""Dev Portal applications from a file in the format of Konnect's list.

``GET /v3/portals/{portalId}/applications`` answers ``{"data": [...], "meta": {"page": {"total": n}}}``
(konnect-portal-management-v3.yaml, ListApplicationsResponse). A file with fewer applications than
`total` is only one of several pages, which is an error.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from openmeter_plugin.units import plural
from syncd.core.errors import SourceError
from syncd.core.model import Principal
from syncd.sources.konnect import application, total


@dataclass(frozen=True, slots=True)
class ApplicationsFile:
    """A JSON file with the applications of a portal."""

    path: Path
    name: str = "applications-file"

    def fingerprint(self) -> None:
        """Return None: a file is read in each run."""

    def read(self) -> Sequence[Principal]:
        """Return the applications."""
        document = self._document()
        listed = document.get("data")
        if not isinstance(listed, list):
            raise SourceError(self.name, f"{self.path} has no list `data` as in Konnect's answer")
        principals = [self._principal(item, index) for index, item in enumerate(listed)]
        self._require_complete(document, len({principal.id for principal in principals}))
        return principals

    def _document(self) -> dict[str, object]:
        try:
            document = json.loads(self.path.read_bytes())
        except OSError as error:
            raise SourceError(self.name, f"cannot read {self.path}: {error.strerror}") from None
        except ValueError as error:
            raise SourceError(self.name, f"{self.path} is not JSON: {error}") from None
        except RecursionError:
            raise SourceError(self.name, f"{self.path} is not JSON: it is nested too deeply") from None
        if not isinstance(document, dict):
            raise SourceError(self.name, f"{self.path} is not a JSON object")
        return document

    def _require_complete(self, document: dict[str, object], found: int) -> None:
        wanted = total(document)
        if wanted is not None and wanted > found:
            raise SourceError(
                self.name,
                f"{self.path} has {found} of {plural(wanted, 'application')} (meta.page.total);"
                " put all pages into `data`",
            )

    def _principal(self, item: object, index: int) -> Principal:
        if not isinstance(item, dict):
            raise SourceError(self.name, f"data[{index}] is not an object")
        return application(item, self.name, f"data[{index}]")
