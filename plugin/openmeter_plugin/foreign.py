"""Text that comes from outside (answers of APIs, errors of libraries), made fit for messages.

Everything that the plugin and syncd show or keep of such a text passes `foreign_text`: one line, nothing that
steers a terminal or turns the direction of writing, and no secret in any spelling.
"""

from __future__ import annotations

import base64
import html.entities
import json
import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache

MAX_CHARACTERS = 300
"""Longest text of others within a message."""

_MASK = "***"
_MAX_READ = 65_536
"""Longest part of a text that is searched for secrets; the rest is cut off."""
_LONGEST_SPELLING = 12
"""Characters that one character of a secret takes at most, such as `&amp;#x0041;`."""
_MIN_ENCODED = 8
"""Characters of an encoded secret that must be found for it to be masked; less would match by chance."""
# C0, DEL, C1 (Cc), zero-width and bidirectional controls (Cf), halves of surrogate pairs (Cs, which no
# output can encode) and private characters (Co).
_UNPRINTABLE = frozenset({"Cc", "Cf", "Cs", "Co"})
_NAMED_ENTITIES = {
    character: sorted(name.rstrip(";") for name, value in html.entities.html5.items() if value == character)
    for character in "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"
}


def foreign_text(text: str, secrets: Iterable[str] = (), limit: int = MAX_CHARACTERS) -> str:
    """Return the text in one line of at most `limit` characters, cleaned, with each secret masked."""
    secrets = [secret for secret in secrets if secret]
    if len(text) > _MAX_READ:
        # A secret that the cut divides would not be recognized, so its beginning is cut off, too.
        text = text[: _MAX_READ - _LONGEST_SPELLING * max(map(len, secrets), default=0)]
    text = _printable(text)
    for secret in secrets:
        text = _spellings(secret).sub(_MASK, text)
        text = _encodings(secret).sub(_MASK, text)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _printable(text: str) -> str:
    return " ".join(_without_controls(text).split())


def printable(text: str) -> str:
    """Return a text of several lines without anything that steers a terminal or the direction of writing."""
    return "\n".join(map(_without_controls, text.split("\n")))


def escaped(document: str) -> str:
    """Return JSON with all that steers a terminal or the direction of writing in escapes: the same value."""
    if document.isascii() and "\x7f" not in document:
        return document
    return "".join(
        character
        if character == "\n" or unicodedata.category(character) not in _UNPRINTABLE
        # Half a surrogate pair is such a character, too.
        else json.dumps(character)[1:-1]
        if character != "\x7f"
        else "\\u007f"
        for character in document
    )


def _without_controls(line: str) -> str:
    if line.isascii() and line.isprintable():
        return line
    return "".join(
        " " if character.isspace() else character
        for character in line
        if character.isspace() or unicodedata.category(character) not in _UNPRINTABLE
    )


@lru_cache(maxsize=64)
def _encodings(secret: str) -> re.Pattern[str]:
    """Return an expression for words that hold the secret in base64 (of either alphabet) or in hex.

    Where a secret begins within base64 decides how it is written: three ways, of which the characters that
    also depend on its neighbours are left out.
    """
    raw = secret.encode("utf-8", "surrogatepass")
    found = [raw.hex(), raw.hex().upper()]
    for before in range(3):
        encoded = base64.b64encode(bytes(before) + raw).decode()
        core = encoded[-(-before * 8 // 6) : (before + len(raw)) * 8 // 6]
        found += [core, core.replace("+", "-").replace("/", "_")]
    alternatives = "|".join(re.escape(word) for word in found if len(word) >= _MIN_ENCODED)
    return re.compile(rf"[\w+/=-]{{0,4}}(?:{alternatives})[\w+/=-]*" if alternatives else r"(?!)")


@lru_cache(maxsize=64)
def _spellings(secret: str) -> re.Pattern[str]:
    """Return an expression for the secret with each of its characters written in any usual way.

    As it is, and as JSON, Python, URLs and HTML escape it, also if it was escaped several times.
    """
    return re.compile("".join(map(_spelling, _printable(secret))))


def _spelling(character: str) -> str:
    code = ord(character)
    # Bounded repeats: a text of nothing but backslashes would take time that grows with its square.
    ways = [
        rf"\\{{0,15}}{re.escape(character)}",
        rf"\\{{1,15}}(?:x|u00)(?i:{code:02x})" if code < 256 else rf"\\{{1,15}}u(?i:{code:04x})",
    ]
    ways.append(
        "".join(rf"%(?:25){{0,4}}(?i:{byte:02x})" for byte in character.encode("utf-8", "surrogatepass"))
    )
    names = "|".join(
        [rf"#0{{0,6}}{code}", rf"#[xX]0{{0,6}}(?i:{code:x})", *_NAMED_ENTITIES.get(character, ())]
    )
    ways.append(rf"&(?:amp;){{0,4}}(?:{names});?")
    if character == " ":
        ways.append(r"\+")
    return f"(?:{'|'.join(ways)})"
