"""Texts of others in messages: one line, nothing that steers a terminal, no secret in any spelling."""

from __future__ import annotations

import base64
import html
import json
import time
import unicodedata
from collections.abc import Callable
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openmeter_plugin.foreign import escaped, foreign_text, printable

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
    "base64": lambda text: base64.b64encode(text.encode()).decode(),
    "base64 for URLs": lambda text: base64.urlsafe_b64encode(text.encode()).decode(),
    "hex": lambda text: text.encode().hex(),
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


@pytest.mark.parametrize("before", ["", "Bearer ", "u:", "ab:"])
def test_a_header_in_base64_shows_nothing_of_its_token(before: str) -> None:
    token = "om_live_1234567890"
    written = base64.b64encode(f"{before}{token} and more".encode()).decode()
    shown = foreign_text(f"you sent {written}", [token])
    assert "***" in shown
    for word in shown.replace("***", " ").split():
        assert token[:4].encode() not in base64.b64decode(word + "===")


@pytest.mark.parametrize(
    "text", ["\\" * 60_000, "&amp;" * 12_000, "%25" * 20_000, "a" * 60_000, "&#0" * 20_000]
)
def test_no_text_takes_long_to_search(text: str) -> None:
    started = time.process_time()
    foreign_text(text, ["aaaaaaaaaaaaaaaaaaaaaaab", TOKEN])
    assert time.process_time() - started < 2


def test_a_secret_at_the_end_of_what_is_searched_is_not_cut_in_two() -> None:
    token = "0123456789abcdef"
    for at in range(65_536 - 40, 65_536, 3):
        shown = foreign_text(" " * at + token + " x" * 100, [token])
        assert "0123" not in shown


def test_several_lines_stay_lines_without_controls() -> None:
    assert printable("a\x1b[31m\n\u202eb\x9b\n") == "a[31m\nb\n"


@given(st.text(st.characters(codec="utf-8")))
def test_escaped_json_is_the_same_value_and_steers_nothing(text: str) -> None:
    shown = escaped(json.dumps([text], ensure_ascii=False))
    assert json.loads(shown) == [text]
    assert not [character for character in shown if unicodedata.category(character) in ("Cc", "Cf")]


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
