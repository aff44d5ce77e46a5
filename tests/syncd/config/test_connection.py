"""Certificates, proxies and URLs of the APIs, as the configuration gives them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from syncd.config.settings import load
from syncd.core.errors import ConfigError
from syncd.runs.factory import gateways_of, metering_endpoint
from tests.harness.sockets import Authority

METERING = {"url": "https://metering.example"}
KONG = {"type": "kong-admin", "url": "https://kong.example"}
KONNECT = {"type": "konnect-consumers", "region": "eu", "control_plane_id": "c"}
EAST = {"name": "east", "url": "https://east.example"}


def write(folder: Path, **sections: Any) -> Path:
    path = folder / "syncd.yaml"
    document = {"sources": [KONG, KONNECT], "metering": METERING, "gateways": [EAST], **sections}
    path.write_text(yaml.safe_dump(document))
    return path


def test_files_are_relative_to_the_configuration(tmp_path: Path) -> None:
    Authority.made(tmp_path)
    files = {"ca_file": "ca.pem", "client_cert": "server.pem", "client_key": "key.pem"}
    path = write(tmp_path, metering=METERING | files, gateways=[EAST | files], sources=[KONG | files])
    config = load(path)
    assert metering_endpoint(config).tls.ca_file == tmp_path / "ca.pem"
    assert config.gateways[0].tls == metering_endpoint(config).tls
    for gateway in gateways_of(config):
        gateway.close()


@pytest.mark.parametrize("name", ["ca_file", "client_cert"])
@pytest.mark.parametrize(
    ("sections", "section"),
    [
        ({"metering": METERING}, "metering"),
        ({"sources": [KONNECT, KONG]}, "sources[1]"),
        ({"sources": [KONG, KONNECT]}, "sources[1]"),
        ({"gateways": [EAST]}, "gateways[0]"),
    ],
)
def test_a_file_that_is_not_there_is_named_at_start(
    sections: dict[str, Any], section: str, name: str, tmp_path: Path
) -> None:
    ((key, value),) = sections.items()
    changed = (
        [*value[:-1], value[-1] | {name: "gone.pem"}]
        if isinstance(value, list)
        else value | {name: "gone.pem"}
    )
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path, **{key: changed}))
    assert f"{section}.{name}: cannot read {tmp_path / 'gone.pem'}" in str(caught.value)


def test_a_proxy_for_an_api_on_this_machine_is_refused_at_start(tmp_path: Path) -> None:
    local = {"url": "http://127.0.0.1:8888", "proxy": "http://me:s3cret-pass@proxy:3128"}
    with pytest.raises(ConfigError, match=r"metering\.proxy: 127\.0\.0\.1 is on this machine") as caught:
        load(write(tmp_path, metering=local))
    assert "s3cret-pass" not in str(caught.value)


@pytest.mark.parametrize(
    ("dialect", "given", "used"),
    [
        ("openmeter-v1", "http://openmeter:8888", "http://openmeter:8888"),
        ("openmeter-v1", "http://openmeter:8888/", "http://openmeter:8888"),
        ("openmeter-v1", "http://openmeter:8888/api/v1", "http://openmeter:8888"),
        ("openmeter-v1", "http://openmeter:8888/billing/api/v1/", "http://openmeter:8888/billing"),
        ("openmeter-v3", "http://openmeter:8888/api/v3", "http://openmeter:8888/api/v3"),
        ("openmeter-v3", "http://openmeter:8888", "http://openmeter:8888/api/v3"),
    ],
)
def test_the_url_may_end_with_the_dialects_path(dialect: str, given: str, used: str, tmp_path: Path) -> None:
    config = load(write(tmp_path, metering={"url": given, "dialect": dialect}))
    assert metering_endpoint(config).url == used
