"""The table of run options: each entry is offered by the commands, the API, the form, and reviewed plans."""

from __future__ import annotations

import re
from typing import Any

import pytest
from pydantic import ValidationError
from typer.main import get_command

from syncd.cli.main import app
from syncd.daemon.api import SyncRequest
from syncd.runs.options import TABLE, RunOptions, described, flag, from_form, hint_for, is_flag


def given(name: str) -> bool | str:
    return True if is_flag(name) else "one"


@pytest.mark.parametrize("command", ["plan", "apply", "resync"])
def test_each_command_offers_the_options_of_its_place_and_no_other(command: str) -> None:
    found: Any = get_command(app)
    offered = {opt for one in found.commands[command].params for opt in one.opts}
    for name, entry in TABLE.items():
        assert (flag(name) in offered) == (command in entry.places), name


@pytest.mark.parametrize("name", TABLE)
def test_an_option_is_the_same_in_the_api_the_history_and_a_reviewed_plan(name: str) -> None:
    asked = {name: given(name)}
    options = SyncRequest.model_validate(asked).options()
    assert getattr(options, name) == given(name)
    assert options.to_json()[name] == given(name)
    if TABLE[name].reviewed:
        assert RunOptions().as_reviewed(options.reviewable()) == options
        with pytest.raises(ValidationError, match="only force"):
            SyncRequest.model_validate({**asked, "reviewed": "id"})
    assert described(options.to_json())


def test_the_form_has_the_options_with_a_label_and_those_that_select() -> None:
    form = {name: "on" if is_flag(name) else " one " for name in TABLE}
    options = from_form(form)
    assert options.dry_run
    assert not options.force
    assert (options.source, options.principal) == ("one", "one")
    assert all(getattr(options, name) for name, entry in TABLE.items() if entry.label)


def test_an_empty_text_is_no_option() -> None:
    with pytest.raises(ValidationError):
        SyncRequest.model_validate({"source": ""})
    assert from_form({"source": "", "principal": " "}) == RunOptions(dry_run=True)


def test_the_hint_of_a_blocked_change_names_the_option_on_the_form() -> None:
    assert hint_for("pass --allow-move, or move it by hand") == "Move subjects between managed customers"
    assert hint_for("it has a subscription") is None


def test_a_description_is_short_words() -> None:
    words = described(RunOptions(force=True, source="edge").to_json())
    assert words == ("guards overridden", "source edge")
    assert all(re.fullmatch(r"[a-z ]+", entry.words) for entry in TABLE.values() if entry.words)
