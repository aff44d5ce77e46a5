"""Text of others, made safe for a terminal: the one place that cleans it."""

from __future__ import annotations


def printable(text: str, keep: str = "") -> str:
    """Return the text with each character that cannot be seen written as ``?``, except those in `keep`.

    Names, reasons and answers come from outside. Control characters (C0, DEL, C1) would steer a terminal,
    and format characters such as U+202E would show a text in another order than it is stored.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char in keep else "?" for char in text)
