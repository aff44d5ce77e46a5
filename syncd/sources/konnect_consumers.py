"""Consumers of a Konnect control plane (konnect-control-planes-config-v2.yaml): paged as Kong pages them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import quote

from syncd.errors import ApiError, SourceError
from syncd.http import ApiClient, Endpoint
from syncd.model import Principal
from syncd.retry import Retry
from syncd.sources.consumers import read_consumers


@dataclass(frozen=True, slots=True)
class KonnectConsumers:
    """One control plane; only consumers that carry all of `tags`."""

    endpoint: Endpoint
    retry: Retry = field(compare=False)
    control_plane_id: str = ""
    tags: tuple[str, ...] = ()
    name: str = "konnect-consumers"

    def fingerprint(self) -> None:
        """Return None: Konnect tells of no change, so the list is read each time."""

    def read(self) -> Sequence[Principal]:
        """Return the consumers, those marked that a plugin uses as `anonymous`."""
        prefix = f"/v2/control-planes/{quote(self.control_plane_id, safe='')}/core-entities"
        try:
            with ApiClient(self.endpoint, self.retry) as client:
                return read_consumers(client, prefix, self.tags, source=self.name, send_tags=True)
        except ApiError as error:
            raise SourceError(self.name, str(error)) from None
