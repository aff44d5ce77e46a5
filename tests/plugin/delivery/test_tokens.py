"""Tokens: the destination's own, or one from a file or the environment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import structlog

from openmeter_plugin.config.instance_config import parse_config
from openmeter_plugin.delivery.options import DeliveryOptions
from openmeter_plugin.instances.instance import destination_of
from openmeter_plugin.spool.destination import token_file, write_destination
from tests.harness.process import eventually
from tests.plugin.deliveries import delivering, ids, record, run_until_empty, spooled
from tests.plugin.events_server import serving
from tests.plugin.spools import QUEUE, destination


def test_a_token_file_overrides_every_destinations_token(tmp_path: Path) -> None:
    mine = tmp_path / "token"
    mine.write_text(" from-the-file\n")
    spool = tmp_path / "spool"
    spool.mkdir()
    with serving() as server:
        write_destination(spool, destination(server.url, id="one", token="stored"))
        write_destination(spool, destination(server.url, id="two"))
        for name in ("one", "two"):
            spooled(spool, [record(1)], name)
        run_until_empty(spool, token_file=mine)
        mine.write_text("new")
        spooled(spool, [record(2)], "one")
        run_until_empty(spool, token_file=mine)
    tokens = [post.headers["authorization"] for post in server.posts]
    assert tokens == ["Bearer from-the-file"] * 2 + ["Bearer new"]


@pytest.mark.parametrize(
    ("token", "sent"),
    [("from-the-environment", "from-the-environment"), ("", "stored")],
    ids=["one", "empty"],
)
def test_a_token_in_the_environment_overrides_the_stored_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str, sent: str
) -> None:
    monkeypatch.setenv("OPENMETER_PLUGIN_TOKEN", token)
    with serving() as server:
        write_destination(tmp_path, destination(server.url, token="stored"))
        spooled(tmp_path, [record(1)])
        run_until_empty(tmp_path)
    assert server.posts[0].headers["authorization"] == f"Bearer {sent}"


def test_no_token_is_stored_if_delivery_has_its_own(tmp_path: Path) -> None:
    write_destination(tmp_path, destination(token="stored"))
    write_destination(tmp_path, destination(token="stored"), keep_token=False)
    assert [p for p in tmp_path.rglob("*") if p.is_file() and b"stored" in p.read_bytes()] == []
    write_destination(tmp_path, destination(token_unresolved=True), keep_token=False)
    assert not token_file(tmp_path, QUEUE).exists()


def test_an_unresolved_token_leaves_the_last_one_in_use(tmp_path: Path) -> None:
    write_destination(tmp_path, destination(token="good"))
    write_destination(tmp_path, destination(token_unresolved=True))
    assert token_file(tmp_path, QUEUE).read_text() == "good"


def test_a_missing_token_file_delays_deliveries_until_it_exists(tmp_path: Path) -> None:
    mine = tmp_path / "token"
    spool = tmp_path / "spool"
    spool.mkdir()
    with serving() as server:
        write_destination(spool, destination(server.url, token="stored"))
        spooled(spool, [record(1)])
        with structlog.testing.capture_logs() as lines, delivering(spool, token_file=mine):
            eventually(lambda: [line for line in lines if line["event"] == "delivery_held"])
            assert server.posts == []
            mine.write_text("there")
            eventually(lambda: server.taken == ids(range(1, 2)))
    assert {post.headers["authorization"] for post in server.posts} == {"Bearer there"}


@pytest.mark.parametrize(
    "config",
    [
        {"api_token": None, "$refs": {"api_token": "{vault://env/openmeter-api-token}"}},
        {"$refs": {"api_token": "{vault://env/openmeter-api-token}"}},
        {"api_token": "", "$refs": {"api_token": "{vault://env/openmeter-api-token}"}},
        {"api_token": "{vault://env/openmeter-api-token}"},
    ],
    ids=["null", "missing", "empty", "still the reference"],
)
def test_without_the_token_of_a_vault_nothing_is_posted_until_kong_can_resolve_it(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    with serving() as server:
        raw = {
            "ingest_endpoint": server.url,
            "__plugin_id": "p",
            "queue": {"initial_retry_delay": 0.01},
            **config,
        }
        described = destination_of(raw, parse_config(raw)[0])
        write_destination(tmp_path, described)
        spooled(tmp_path, [record(1)], described.id)
        with structlog.testing.capture_logs() as lines, delivering(tmp_path):
            eventually(lambda: [line for line in lines if line["event"] == "delivery_held"])
            assert server.posts == []
            resolved = {**raw, "api_token": "sk-1"} | {
                "$refs": {"api_token": "{vault://env/openmeter-api-token}"}
            }
            again = destination_of(resolved, parse_config(resolved)[0])
            assert again.id == described.id
            write_destination(tmp_path, again)
            eventually(lambda: server.taken == ids(range(1, 2)))
    held = next(line for line in lines if line["event"] == "delivery_held")
    assert (held["hold"], "{vault://env/openmeter-api-token}" in held["reason"]) == ("token", True)
    assert {post.headers["authorization"] for post in server.posts} == {"Bearer sk-1"}


def test_without_api_token_events_are_posted_without_one(tmp_path: Path) -> None:
    with serving() as server:
        raw: dict[str, Any] = {"ingest_endpoint": server.url, "__plugin_id": "p"}
        described = destination_of(raw, parse_config(raw)[0])
        write_destination(tmp_path, described)
        spooled(tmp_path, [record(1)], described.id)
        run_until_empty(tmp_path)
    assert "authorization" not in server.posts[0].headers


def test_a_token_that_is_gone_from_the_spool_is_missed(tmp_path: Path) -> None:
    with serving() as server:
        raw: dict[str, Any] = {"ingest_endpoint": server.url, "__plugin_id": "p", "api_token": "sk-1"}
        described = destination_of(raw, parse_config(raw)[0])
        write_destination(tmp_path, described)
        token_file(tmp_path, described.id).unlink()
        spooled(tmp_path, [record(1)], described.id)
        with structlog.testing.capture_logs() as lines, delivering(tmp_path):
            eventually(lambda: [line for line in lines if line["event"] == "delivery_held"])
        assert server.posts == []


@pytest.mark.parametrize("content", [b"", b" \n", b"sk\nsk", b"sk\xff", "schlüssel".encode()])
def test_a_token_file_that_no_header_can_hold_is_named_without_its_content(
    tmp_path: Path, content: bytes
) -> None:
    file = tmp_path / "the-token"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"^--token-file: {file}") as caught:
        DeliveryOptions(tmp_path, token_file=file).token()
    assert "sk" not in str(caught.value)
    assert "schl" not in str(caught.value)


def test_white_space_around_a_token_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "the-token"
    file.write_bytes(b"sk-1 \r\n\n")
    assert DeliveryOptions(tmp_path, token_file=file).token() == "sk-1"
    monkeypatch.setenv("OPENMETER_PLUGIN_TOKEN", "sk-2\n")
    assert DeliveryOptions(tmp_path).token() == "sk-2"
