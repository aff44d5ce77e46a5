"""Instances that Kong has started: when they are forgotten, and the destinations of their events."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest

from openmeter_plugin.config.instance_config import parse_config
from openmeter_plugin.instances.instance import InstanceIds, Instances, destination_of
from openmeter_plugin.spool.destination import Destination
from tests.plugin.spools import running_writer

ENDPOINT = "https://metering.example/api/v1/events"


def destination(**config: Any) -> Destination:
    raw = {"ingest_endpoint": ENDPOINT, "__plugin_id": "the-plugin"} | config
    return destination_of(raw, parse_config(raw)[0])


def test_an_instance_without_an_event_for_a_while_is_forgotten_and_one_in_use_is_not(tmp_path: Path) -> None:
    config = orjson.dumps({"ingest_endpoint": ENDPOINT})
    with running_writer(tmp_path) as writer:
        instances = Instances(InstanceIds(tmp_path), writer)
        used, idle = instances.start(config), instances.start(config)
        instances.forget_unused()
        assert len(instances) == 2
        assert instances.get(used.id) is used
        assert instances.used == {used.id}
        instances.forget_unused()
        assert instances.used == set()
        assert instances.get(used.id) is used
        assert instances.get(idle.id) is None
        assert len(instances) == 1


def test_a_destination_has_the_configurations_values_in_seconds() -> None:
    queue = {
        "max_batch_size": 7,
        "max_coalescing_delay": 3,
        "concurrency_limit": 1,
        "initial_retry_delay": 0.5,
        "max_retry_delay": 30,
    }
    found = destination(api_token="t", timeout=2500, keepalive=90_000, ssl_verify=False, queue=queue)
    assert found == Destination(
        id=found.id,
        endpoint=ENDPOINT,
        timeout=2.5,
        keepalive=90.0,
        ssl_verify=False,
        max_batch_size=7,
        max_coalescing_delay=3,
        concurrency=1,
        initial_retry_delay=0.5,
        max_retry_delay=30,
        token="t",
        token_from="api_token",
        token_unresolved=False,
    )


def test_a_vault_token_is_identified_by_its_reference_not_by_plugin_or_value() -> None:
    first = {"api_token": "{vault://env/first}"}
    one = destination(api_token="old", **{"$refs": first})
    assert destination(api_token="new", __plugin_id="another", **{"$refs": first}).id == one.id
    assert destination(api_token="old", **{"$refs": {"api_token": "{vault://env/second}"}}).id != one.id


def test_a_token_in_the_configuration_is_identified_by_its_plugin() -> None:
    one = destination(api_token="old")
    assert destination(api_token="new").id == one.id
    assert destination(api_token="old", __plugin_id="another").id != one.id
    assert destination(api_token="old", ingest_endpoint="https://another.example/events").id != one.id


@pytest.mark.parametrize("token", [None, ""])
def test_a_token_that_the_vault_did_not_resolve_is_distinguished_from_no_token(token: str | None) -> None:
    reference = {"$refs": {"api_token": "{vault://env/t}"}}
    assert destination(api_token=token, **reference).token_unresolved
    assert not destination(api_token=token).token_unresolved
    assert not destination(api_token="given", **reference).token_unresolved
