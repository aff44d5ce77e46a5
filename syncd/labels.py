"""The label rules of the v3 API, as its specification and its server's code have them.

api/v3/labels/validate.go is narrower than the specification: separators only one at a time, which
also refuses ``a--b``; and it reserves more prefixes. A label is safe where both accept it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_RESERVED = re.compile(r"_|kong|konnect|insomnia|mesh|kic|kuma|openmeter")
# Letters and digits with single separators between them. The server's own expression reads pairs, and
# refuses some of what this accepts with a dot or an underscore (``a_b-c.d``), so only dashes are safe.
_SAFE = re.compile(r"[A-Za-z0-9]+(?:-[A-Za-z0-9]+)*")
_LONGEST = 63


def is_label_value(text: str) -> bool:
    """Tell whether `text` may stand in a label as it is."""
    return len(text) <= _LONGEST and _SAFE.fullmatch(text) is not None


def has_reserved_prefix(key: str) -> bool:
    """Tell whether the server refuses a label of this key because of how it begins."""
    return _RESERVED.match(key) is not None


def is_label(key: str, value: str) -> bool:
    """Tell whether a server takes this label, whatever its version."""
    return is_label_value(key) and is_label_value(value) and not has_reserved_prefix(key)


def without_unlabelled(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return what of these metadata can be labels; our marks always can."""
    return {key: value for key, value in metadata.items() if is_label(key, value)}
