"""What all sections of the configuration are made of."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from syncd.labels import is_label_value
from syncd.ownership import RESERVED_KEYS

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_DURATION = re.compile(r"(\d+)\s*([smhd])")


def _duration(value: object) -> object:
    if isinstance(value, timedelta):
        return value
    match = _DURATION.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None or int(match[1]) == 0:
        raise ValueError("a duration is a number and a unit, such as 30s, 5m or 1h")
    return timedelta(seconds=int(match[1]) * _UNITS[match[2]])


def _http_url(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ValueError("must be an http:// or https:// URL")
    if parts.username or parts.password:
        raise ValueError("must not hold a user or a password; use token")
    if parts.query or parts.fragment:
        raise ValueError("must end with the path, without ? or #")
    return value.rstrip("/")


def _label(value: str) -> str:
    if not is_label_value(value):
        raise ValueError("must be 1 to 63 letters and digits, with single dashes between them")
    return value


def _not_reserved(value: dict[str, str]) -> dict[str, str]:
    if taken := sorted(RESERVED_KEYS & value.keys()):
        raise ValueError(f"must not set {', '.join(taken)}: syncd's own marks")
    return value


Duration = Annotated[timedelta, BeforeValidator(_duration)]
HttpUrl = Annotated[str, AfterValidator(_http_url)]
Key = Annotated[str, Field(min_length=1, max_length=256)]
Tag = Annotated[str, Field(min_length=1, pattern=r"^[^,/]+$")]
Label = Annotated[str, AfterValidator(_label)]
Metadata = Annotated[dict[str, str], AfterValidator(_not_reserved)]


class Section(BaseModel):
    """A part of the configuration: unknown settings are errors, nothing changes once it is read.

    The text below a field is what docs/syncd-settings.md says of it (`tests.settings_reference`).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
