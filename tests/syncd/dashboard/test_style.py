"""The style sheet: contrast as WCAG requires, and no external resources."""

from __future__ import annotations

import re
from importlib.resources import files

import pytest

STYLE = (files("syncd.dashboard") / "static" / "dashboard.css").read_text()
ICON = (files("syncd.dashboard") / "static" / "icon.svg").read_text()
TEXT = [
    *((ink, ground) for ink in ("ink", "quiet", "accent") for ground in ("page", "card")),
    *((ink, f"{ink}-soft") for ink in ("ok", "warning", "problem", "busy")),
    *(("ink", f"{ground}-soft") for ground in ("line", "warning", "problem", "busy")),
    ("accent-ink", "accent"),
    ("card", "ink"),
]
LIGHT, DARK = (
    dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block))
    for block in re.findall(r":root \{\n\s+(?:color-scheme|--page)[^}]+\}", STYLE)
)


def luminance(colour: str) -> float:
    def linear(value: float) -> float:
        return value / 12.92 if value <= 0.04045 else float(((value + 0.055) / 1.055) ** 2.4)

    red, green, blue = (linear(int(colour[at : at + 2], 16) / 255) for at in (1, 3, 5))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize(("ink", "ground"), TEXT)
def test_text_has_enough_contrast(colours: dict[str, str], ink: str, ground: str) -> None:
    assert contrast(colours[ink], colours[ground]) >= 4.5


def test_contrast_is_computed_as_in_wcag() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.01)


def test_nothing_is_loaded_from_elsewhere() -> None:
    assert "@import" not in STYLE
    assert "url(" not in STYLE
    assert "http" not in ICON.replace("http://www.w3.org/2000/svg", "")
    assert "<script" not in ICON


def test_focus_is_never_hidden() -> None:
    hidden = re.findall(r"([^{}]+)\{[^}]*outline: none", STYLE)
    assert [selector.strip() for selector in hidden] == ["main:focus"], (
        "only elements that the keyboard cannot reach"
    )
    assert ":focus-visible { outline: 3px" in STYLE
