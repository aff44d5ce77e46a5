"""The profile `openmeter` of docker-compose.yml and its configuration, without a Docker engine."""

from __future__ import annotations

from contextlib import closing
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import yaml

from syncd.metering.meters import apply_meters
from syncd.sandbox.testing import running_sandbox
from tests.deploy.files import ROOT, compose, mounts, service
from tests.syncd.targets import open_target

CONFIG = ROOT / "docs" / "examples" / "openmeter" / "config.yaml"
PROFILE = sorted(name for name, entry in compose()["services"].items() if "profiles" in entry)
STORES = {"clickhouse": 9000, "kafka": 9092, "postgres": 5432, "redis": 6379}


def config() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load(CONFIG.read_text())
    return document


def test_the_profile_adds_openmeter_and_nothing_to_what_runs_without_it() -> None:
    assert sorted(["openmeter", "openmeter-sink-worker", *STORES]) == PROFILE
    assert all(service(name)["profiles"] == ["openmeter"] for name in PROFILE)


def test_what_runs_without_the_profile_needs_nothing_of_it() -> None:
    for name, entry in compose()["services"].items():
        needed = {
            other
            for other, how in entry.get("depends_on", {}).items()
            if how.get("required", True) is not False
        }
        assert name in PROFILE or not needed & set(PROFILE), name


def test_openmeter_answers_to_the_name_and_port_that_plugin_and_syncd_know_the_sandbox_by() -> None:
    assert service("openmeter")["networks"]["default"]["aliases"] == ["sandbox"]
    command: list[str] = service("openmeter")["command"]
    listens = command[command.index("--address") + 1].rpartition(":")[2]
    assert urlsplit(service("syncd")["environment"]["SYNCD_METERING__URL"]).netloc == f"sandbox:{listens}"


def test_openmeter_and_a_sandbox_that_was_left_running_cannot_both_start() -> None:
    assert service("openmeter")["ports"] == service("sandbox")["ports"]


def test_server_and_sink_read_the_same_configuration() -> None:
    for name in ("openmeter", "openmeter-sink-worker"):
        command: list[str] = service(name)["command"]
        target = command[command.index("--config") + 1]
        assert ROOT / mounts(name)[target] == CONFIG


def test_the_sink_deduplicates_in_redis_and_the_ingest_side_does_not() -> None:
    dedupe = config()["sink"]["dedupe"]
    assert dedupe["enabled"] is True
    assert dedupe["driver"] == "redis"
    assert "dedupe" not in config()


def test_an_id_is_remembered_for_longer_than_usage_can_be_sent_again() -> None:
    hours = int(config()["sink"]["dedupe"]["config"]["expiration"].removesuffix("h"))
    assert hours > 31 * 24


def test_redis_keeps_what_it_has_seen() -> None:
    command: list[str] = service("redis")["command"]
    assert command[command.index("--appendonly") + 1] == "yes"
    assert command[command.index("--maxmemory-policy") + 1] == "noeviction"


@pytest.mark.parametrize("name", STORES)
def test_what_a_store_holds_outlives_its_container(name: str) -> None:
    sources = list(mounts(name).values())
    assert sources
    assert set(sources) <= set(compose()["volumes"])


@pytest.mark.parametrize("name", STORES)
def test_no_store_is_published(name: str) -> None:
    assert "ports" not in service(name)


def test_openmeter_looks_for_its_stores_where_they_are() -> None:
    said = config()
    addresses = {
        "clickhouse": said["aggregation"]["clickhouse"]["address"],
        "kafka": said["ingest"]["kafka"]["broker"],
        "postgres": urlsplit(said["postgres"]["url"]).netloc.rpartition("@")[2],
        "redis": said["sink"]["dedupe"]["config"]["address"],
    }
    assert addresses == {name: f"{name}:{port}" for name, port in STORES.items()}
    assert said["sink"]["kafka"]["brokers"] == addresses["kafka"]
    assert (
        service("kafka")["environment"]["KAFKA_ADVERTISED_LISTENERS"] == f"PLAINTEXT://{addresses['kafka']}"
    )


def test_openmeter_has_the_names_and_passwords_that_its_stores_have() -> None:
    clickhouse = config()["aggregation"]["clickhouse"]
    environment = service("clickhouse")["environment"]
    assert [clickhouse[key] for key in ("username", "password", "database")] == [
        environment[f"CLICKHOUSE_{key}"] for key in ("USER", "PASSWORD", "DB")
    ]
    postgres = urlsplit(config()["postgres"]["url"])
    environment = service("postgres")["environment"]
    assert [postgres.username, postgres.password, postgres.path.strip("/")] == [
        environment[f"POSTGRES_{key}"] for key in ("USER", "PASSWORD", "DB")
    ]


def test_the_meters_are_those_that_syncd_meters_apply_creates() -> None:
    with running_sandbox() as url, httpx.Client(base_url=url, trust_env=False) as sandbox:
        for meter in sandbox.get("/api/v1/meters").raise_for_status().json():
            sandbox.delete(f"/api/v1/meters/{meter['slug']}").raise_for_status()
        with closing(open_target("openmeter-v1", url)) as target:
            results = apply_meters(target)
        assert {result.status for result in results} == {"created"}
        created = sandbox.get("/api/v1/meters").raise_for_status().json()
    names = ("slug", "name", "description", "eventType", "aggregation", "valueProperty", "groupBy")
    by_us = {meter["slug"]: {name: meter[name] for name in names if meter.get(name)} for meter in created}
    assert {meter["slug"]: meter for meter in config()["meters"]} == by_us


def test_no_dimension_has_a_capital_letter_which_openmeter_would_not_keep() -> None:
    names = [name for meter in config()["meters"] for name in meter["groupBy"]]
    assert names == [name.lower() for name in names]
