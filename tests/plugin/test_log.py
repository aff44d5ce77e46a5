"""Log lines: JSON, whatever their fields hold, and short enough for a pipe to take them at once."""

from __future__ import annotations

import json
import os

import pytest
import structlog

from openmeter_plugin.log import StderrSink, render

PIPE_BUF = 4096  # what a pipe that polls as writable takes at once: pipe(7)


def line_of(**fields: object) -> str:
    line = render(None, "error", {"event": "post_failed", "level": "error", "pid": 7, **fields})
    assert len(line.encode()) < PIPE_BUF
    return line


@pytest.mark.parametrize(
    "value",
    [
        "x" * 100_000,
        "\U0001f4b0" * 5_000,
        "\x00\n" * 5_000,
        "\ud800" * 5_000,
        ["an item of a list"] * 2_000,
        {"key": {"nested": "y" * 9_000}},
    ],
    ids=["long", "beyond ASCII", "control characters", "lone surrogates", "list", "nested"],
)
def test_a_line_with_a_long_field_stays_json_and_says_what_was_cut(value: object) -> None:
    parsed = json.loads(line_of(reason=value, queue="a"))
    assert "characters cut" in parsed["reason"]
    assert (parsed["event"], parsed["pid"], parsed["queue"]) == ("post_failed", 7, "a")


def test_of_a_long_exception_the_last_line_is_kept() -> None:
    trace = "Traceback (most recent call last):\n" + "  File somewhere\n" * 1_000 + "ValueError: the cause"
    shown = json.loads(line_of(exception=trace))["exception"]
    assert shown.startswith("Traceback")
    assert shown.endswith("ValueError: the cause")


def test_a_line_that_fits_is_not_changed() -> None:
    fields = {"reason": "x" * 3_800, "count": 3, "none": None, "where": ["a", 1]}
    assert json.loads(line_of(**fields)) == {
        "event": "post_failed",
        "level": "error",
        "pid": 7,
        **fields,
    }


def test_an_event_with_too_many_fields_keeps_its_name_and_says_how_many_are_missing() -> None:
    parsed = json.loads(line_of(**{f"field_{number}": "v" * 90 for number in range(200)}))
    assert parsed["event"] == "post_failed"
    assert parsed["fields_left_out"] == 201


def test_what_is_written_to_a_pipe_is_one_whole_line() -> None:
    reader, writer = os.pipe()
    try:
        log = structlog.wrap_logger(StderrSink(writer), processors=[render])
        log.error("post_failed", reason="x" * 100_000)
        written = os.read(reader, 100_000)
    finally:
        os.close(reader)
        os.close(writer)
    assert written.endswith(b"\n")
    assert json.loads(written)["event"] == "post_failed"
