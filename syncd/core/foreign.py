"""Text that comes from outside (answers of APIs, errors of libraries), made fit for messages.

Everything that syncd shows of such a text passes `foreign_text`: one line, nothing that steers a terminal or
turns the direction of writing, and no secret in any spelling.
"""

from __future__ import annotations

import html.entities
import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache

MAX_CHARACTERS = 300
"""Longest text of others within a message."""

_MASK = "***"
# C0, DEL, C1 (Cc), zero-width and bidirectional controls (Cf), halves of surrogate pairs (Cs, which no
# output can encode) and private characters (Co).
_UNPRINTABLE = frozenset({"Cc", "Cf", "Cs", "Co"})
_NAMED_ENTITIES = {
    character: sorted(name.rstrip(";") for name, value in html.entities.html5.items() if value == character)
    for character in "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"
}


def foreign_text(text: str, secrets: Iterable[str] = (), limit: int = MAX_CHARACTERS) -> str:
    """Return the text in one line of at most `limit` characters, cleaned, with each secret masked."""
    text = _printable(text)
    for secret in secrets:
        if secret:
            text = _spellings(secret).sub(_MASK, text)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _printable(text: str) -> str:
    if not text.isascii() or not text.isprintable():
        text = "".join(
            " " if character.isspace() else character
            for character in text
            if character.isspace() or unicodedata.category(character) not in _UNPRINTABLE
        )
    return " ".join(text.split())


@lru_cache(maxsize=64)
def _spellings(secret: str) -> re.Pattern[str]:
    """Return an expression for the secret with each of its characters written in any usual way.

    As it is, and as JSON, Python, URLs and HTML escape it, also if it was escaped several times.
    """
    return re.compile("".join(map(_spelling, _printable(secret))))


def _spelling(character: str) -> str:
    code = ord(character)
    ways = [rf"\\*{re.escape(character)}", rf"\\+(?:x|u00)(?i:{code:02x})" if code < 256 else ""]
    if code >= 256:
        ways[1] = rf"\\+u(?i:{code:04x})"
    ways.append("".join(rf"%(?:25)*(?i:{byte:02x})" for byte in character.encode("utf-8", "surrogatepass")))
    names = "|".join([rf"#0*{code}", rf"#[xX]0*(?i:{code:x})", *_NAMED_ENTITIES.get(character, ())])
    ways.append(rf"&(?:amp;)*(?:{names});?")
    if character == " ":
        ways.append(r"\+")
    return f"(?:{'|'.join(ways)})"
