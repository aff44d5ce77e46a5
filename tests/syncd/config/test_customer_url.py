"""The link to a customer's page in the metering service."""

from __future__ import annotations

from pathlib import Path

import pytest

from syncd.config.settings import MeteringConfig, load
from syncd.core.errors import ConfigError


def metering(folder: Path, url: str, *more: str) -> MeteringConfig:
    path = folder / "syncd.yaml"
    section = "\n".join(f"  {line}" for line in (f"url: {url}", *more))
    path.write_text(f"sources: [{{type: static, subjects: []}}]\nmetering:\n{section}\n")
    return load(path).metering


@pytest.mark.parametrize("host", ["eu", "us", "au", "in"])
def test_in_konnect_it_is_the_page_of_the_region_of_the_api(tmp_path: Path, host: str) -> None:
    found = metering(tmp_path, f"https://{host}.api.konghq.com", "dialect: openmeter-v3")
    page = f"https://cloud.konghq.com/{host}/metering-billing/customers/01M8"
    assert found.page_of("01M8", "acme") == page


@pytest.mark.parametrize("dialect", ["openmeter-v1", "openmeter-v3"])
def test_a_self_hosted_server_has_no_page_unless_one_is_set(tmp_path: Path, dialect: str) -> None:
    assert metering(tmp_path, "http://openmeter:8888", f"dialect: {dialect}").page_of("01M8", "acme") is None
    template = 'customer_url: "https://billing.example.com/c/{key}?id={id}"'
    found = metering(tmp_path, "http://openmeter:8888", f"dialect: {dialect}", template)
    assert found.page_of("01M8", "a/b?c {id}") == (
        "https://billing.example.com/c/a%2Fb%3Fc%20%7Bid%7D?id=01M8"
    ), "a key is one part of the address, whatever is in it"
    assert found.page_of("01M8", None) is None, "a customer without a key has no such page"


def test_an_empty_address_means_no_link(tmp_path: Path) -> None:
    found = metering(tmp_path, "https://eu.api.konghq.com", "dialect: openmeter-v3", 'customer_url: ""')
    assert found.page_of("01M8", "acme") is None


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("https://billing.example.com/customers", "must contain {id} or {key}"),
        ("https://billing.example.com/{name}", "has no field {name}"),
        ("javascript:alert({id})", "must be an http:// or https:// URL"),
        ("https://{key}.example.com/", "must be an http:// or https:// URL"),
    ],
)
def test_an_address_that_cannot_be_one_is_refused_by_name(tmp_path: Path, value: str, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        metering(tmp_path, "http://openmeter:8888", f'customer_url: "{value}"')
    assert "metering.customer_url" in str(refused.value)
    assert said in str(refused.value)
