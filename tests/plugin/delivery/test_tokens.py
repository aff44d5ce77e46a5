"""Tokens: the destination's own, or one from a file or the environment."""

from __future__ import annotations

from pathlib import Path

import pytest
import structlog

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
