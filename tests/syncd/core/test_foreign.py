"""Texts of others in messages: one line, nothing that steers a terminal, no secret in any spelling."""

from __future__ import annotations

import html
import json
import unicodedata
from collections.abc import Callable
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import given
from hypothesis import strategies as st

from syncd.core.foreign import foreign_text

TOKEN = "sk+a/b=c&d\"e'f\\g<h> i%20"

SPELLINGS: dict[str, Callable[[str], str]] = {
    "plain": str,
    "JSON": lambda text: json.dumps(text)[1:-1],
    "JSON, each character": lambda text: "".join(f"\\u{ord(character):04X}" for character in text),
    "JSON with escaped slashes": lambda text: json.dumps(text)[1:-1].replace("/", "\\/"),
    "JSON in JSON": lambda text: json.dumps(json.dumps(text))[3:-3],
    "Python": lambda text: repr(text)[1:-1],
    "bytes of Python": lambda text: repr(text.encode())[2:-1],
    "URL": lambda text: quote(text, safe=""),
    "URL, lower case": lambda text: quote(text, safe="").lower(),
    "form": quote_plus,
    "URL in a URL": lambda text: quote(quote(text, safe=""), safe=""),
    "HTML": html.escape,
    "HTML by number": lambda text: "".join(f"&#{ord(character)};" for character in text),
    "HTML by hex": lambda text: "".join(f"&#x{ord(character):X};" for character in text),
    "HTML in HTML": lambda text: html.escape(html.escape(text)),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_secret_is_masked_in_every_spelling(spelling: str) -> None:
    written = SPELLINGS[spelling](TOKEN)
    assert foreign_text(f"bad header: {written}!", [TOKEN]) == "bad header: ***!"


@given(
    st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=8), st.sampled_from(list(SPELLINGS))
)
def test_any_secret_is_masked_in_any_spelling(token: str, spelling: str) -> None:
    assert token not in foreign_text(f"<{SPELLINGS[spelling](token)}>", [token]).strip("<>")


def test_a_secret_is_masked_before_the_text_is_cut() -> None:
    text = foreign_text("x" * 290 + TOKEN, [TOKEN])
    assert text.endswith("***")
    assert len(foreign_text("x" * 1000)) == 300


def test_a_secret_with_invisible_characters_within_is_masked() -> None:
    assert foreign_text("se\u200bcr\x1bet!", ["secret!"]) == "***"


@given(st.text())
def test_nothing_foreign_steers_a_terminal_or_the_direction_of_writing(text: str) -> None:
    shown = foreign_text(text)
    assert not [character for character in shown if unicodedata.category(character) in ("Cc", "Cf", "Cs")]
    assert "\n" not in shown
    shown.encode()


def test_names_of_people_stay_as_they_are() -> None:
    assert foreign_text("Zoë Ångström 株式会社 🙂") == "Zoë Ångström 株式会社 🙂"
