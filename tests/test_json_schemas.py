"""The JSON Schemas of docs/schemas: what editors say about a configuration is what the programs say."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from syncd.config.settings import load
from syncd.core.errors import ConfigError
from tests.json_schemas import FOLDER, SCHEMAS, text

ROOT = Path(__file__).parents[1]
EXAMPLES = {"syncd.json": "syncd.yaml", "openmeter-plugin.json": "openmeter-plugin.yaml"}
MINIMAL = """\
sources: [{type: declarative-file, path: kong.yml}]
metering: {url: "http://127.0.0.1:8888"}
"""


def faults(name: str, document: str) -> list[str]:
    return [
        error.message for error in Draft202012Validator(SCHEMAS[name]()).iter_errors(yaml.safe_load(document))
    ]


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_published_schemas_are_up_to_date_and_valid(name: str) -> None:
    assert (FOLDER / name).read_text() == text(name), "run make docs"
    Draft202012Validator.check_schema(SCHEMAS[name]())


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_examples_are_valid(name: str) -> None:
    assert faults(name, (ROOT / "docs" / "examples" / EXAMPLES[name]).read_text()) == []


@pytest.mark.parametrize(
    "text",
    [
        MINIMAL.replace("url:", "ulr:"),
        MINIMAL + "polciy: sync\n",
        MINIMAL + "policy: mirror\n",
        MINIMAL + "schedule: soon\n",
        MINIMAL + "schedule: {interval: fast}\n",
        MINIMAL + "guards: {min_changes: 0}\n",
        MINIMAL + "daemon: {dashboard: perhaps}\n",
        MINIMAL.replace("declarative-file", "declarativ-file"),
        MINIMAL.replace("path:", "pth:"),
        "sources: []\n",
        "sources: kong\n",
    ],
)
def test_a_slip_that_syncd_refuses_is_one_for_an_editor_too(text: str, tmp_path: Path) -> None:
    assert faults("syncd.json", text)
    (tmp_path / "syncd.yaml").write_text(text)
    with pytest.raises(ConfigError):
        load(tmp_path / "syncd.yaml")


@pytest.mark.parametrize(
    "text",
    [
        MINIMAL,
        MINIMAL + "schedule: {interval: 5m, jitter: 10s}\n",
        MINIMAL + "mapping: {group_by: tag, create: {metadata: {team: a}, billing_address: {country: DE}}}\n",
        MINIMAL + "gateways: [{name: east, url: 'http://127.0.0.1:1', token: t}]\n",
    ],
)
def test_what_syncd_accepts_an_editor_does_not_complain_about(text: str, tmp_path: Path) -> None:
    assert faults("syncd.json", text) == []
    (tmp_path / "syncd.yaml").write_text(text)
    load(tmp_path / "syncd.yaml")


def test_a_slip_in_the_plugins_file_is_one_for_an_editor() -> None:
    valid = "ingest_endpoint: http://127.0.0.1:8888/api/v1/events\n"
    assert faults("openmeter-plugin.json", valid + "http_log: {secret: [abcdefghijklmnop]}\n") == []
    assert faults("openmeter-plugin.json", valid + "ingest_endpont: x\n")
    assert faults("openmeter-plugin.json", valid + "subject: {look_up_value_in: nowhere}\n")
    assert faults("openmeter-plugin.json", valid + "http_log: {max_boddy: 1}\n")
