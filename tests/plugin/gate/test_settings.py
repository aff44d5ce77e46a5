"""The settings file: what it says to Kong, and what is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from openmeter_plugin.config.instance_config import ConfigError
from openmeter_plugin.gate.settings import Settings, load
from tests.deploy.files import ROOT

PAGE = ROOT / "docs" / "gate.md"
PLAIN: dict[str, Any] = {"metering": {"url": "http://openmeter:8888"}, "features": [{"key": "api"}]}


def loaded(folder: Path, **settings: Any) -> Settings:
    path = folder / "gate.yaml"
    path.write_text(yaml.safe_dump(PLAIN | settings))
    return load(path)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"mode": "block"}, "mode:"),
        ({"metering": {"url": "openmeter:8888"}}, "metering: url must be"),
        ({"metering": {"url": "http://o", "token": "t"}}, "metering.token:"),
        ({"features": []}, "features:"),
        ({"features": [{"key": "Not A Key"}]}, "features.0.key:"),
        ({"features": [{"key": "api"}, {"key": "api"}]}, "a key is there twice"),
        ({"apply": [{"features": ["other"]}]}, "other is not one of features"),
        ({"apply": [{"features": ["api"], "route": "a", "tag": "b"}]}, "apply.0:"),
        ({"answers": {"NO_REASON": {"status": 429, "message": "m"}}}, "answers.NO_REASON"),
        ({"answers": {"STALE": {"status": 200, "message": "m"}}}, "answers.STALE.status:"),
        ({"subject": {"look_up_in": "header"}}, "look_up_in: there is no such setting"),
        ({"subject": {"look_up_value_in": "consumer", "field": "no"}}, "subject"),
        ({"max_stal": 3}, "max_stal: there is no such setting"),
        ({"metering": {"url": "http://o", "token_file": "/nowhere"}}, "metering.token_file:"),
    ],
    ids=repr,
)
def test_a_wrong_setting_is_named(tmp_path: Path, settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as error:
        loaded(tmp_path, **settings)
    assert named in str(error.value)
    assert "gate.yaml" in str(error.value)


def test_kong_gets_all_that_it_decides_by(tmp_path: Path) -> None:
    features = [{"key": "api"}, {"key": "tokens", "counts": "tokens", "reserve": 500}]
    apply = [{"features": ["api"]}, {"route": "chat", "features": ["api", "tokens"]}]
    answers = {"STALE": {"status": 500, "message": "a\tb%"}}
    subject = {"look_up_value_in": "header", "field": "X-Team"}
    found = loaded(tmp_path, features=features, apply=apply, answers=answers, subject=subject)
    lines = found.lines("1.0")
    lookups = [text for text in lines if text.startswith("L")]
    assert {"F\tapi\t1", "F\ttokens\t500", "R\tall\t*\tapi", "R\troute\tchat\tapi,tokens"} <= set(lines)
    assert "W\tSTALE\t500\ta%09b%25" in lines
    assert lookups == [
        "L\t1\theader\tx-team",
        "L\t2\tapplication\tid",
    ]
    assert {"C\tmode\tshadow", "C\tunseen\tallow", "C\tversion\t1.0"} <= set(lines)


def test_the_page_names_every_setting_and_its_default() -> None:
    page = PAGE.read_text()
    for name in Settings.model_fields:
        assert f"`{name}`" in page, name


def test_the_example_of_the_page_is_valid(tmp_path: Path) -> None:
    example = page_example()
    (tmp_path / "gate.yaml").write_text(example)
    assert load(tmp_path / "gate.yaml").mode == "shadow"


def page_example() -> str:
    return PAGE.read_text().partition("```yaml\n")[2].partition("```")[0]
