"""`spool redirect`: what waits for a wrong address, and replays of its dead letters, go to the right one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from openmeter_plugin.books.replay import replay_dead_letters
from openmeter_plugin.spool.destination import read_destination, write_destination
from tests.harness.process import eventually
from tests.plugin.deliveries import delivered, delivering, ids, record, rejects, run_until_empty, spooled
from tests.plugin.events_server import Answer, EventsServer, serving
from tests.plugin.spool_commands import run
from tests.plugin.spools import destination

OLD, NEW = "0000111122223333", "4444555566667777"


def test_a_backlog_and_replays_go_to_todays_endpoint_with_its_token(tmp_path: Path) -> None:
    with serving(EventsServer(rejects({"event-000001"}))) as wrong, serving() as right:
        write_destination(tmp_path, destination(wrong.url, id=OLD, token="old"))
        spooled(tmp_path, [record(n) for n in range(3)], OLD)
        run_until_empty(tmp_path)
        wrong.script = lambda _: Answer(503)
        write_destination(tmp_path, destination(right.url, id=NEW, token="new"))
        spooled(tmp_path, [record(n) for n in range(3, 6)], OLD)
        with delivering(tmp_path):
            eventually(lambda: len(wrong.posts) > 3, what="failures")
            result = run("redirect", "--from", OLD, "--to", NEW, str(tmp_path))
            assert result.returncode == 0
            assert result.stdout.endswith(f"events of {OLD} go to {right.url}\n")
            replay_dead_letters(tmp_path)
            eventually(lambda: delivered(tmp_path, OLD) == 6, what="delivery")
    assert sorted(right.taken) == ids(range(1, 2), range(3, 6))
    assert {post.headers["authorization"] for post in right.posts} == {"Bearer new"}


def test_a_redirect_ends_on_request_and_when_kong_names_the_destination_again(tmp_path: Path) -> None:
    write_destination(tmp_path, destination("http://old/", id=OLD))
    write_destination(tmp_path, destination("http://new/", id=NEW))

    def address() -> str:
        found = read_destination(tmp_path, OLD)
        assert found is not None
        return f"{found.id} {found.endpoint}"

    run("redirect", "--from", OLD, "--to", NEW, str(tmp_path))
    assert address() == f"{OLD} http://new/"
    run("redirect", "--from", OLD, str(tmp_path))
    assert address() == f"{OLD} http://old/"
    run("redirect", "--from", OLD, "--to", NEW, str(tmp_path))
    write_destination(tmp_path, destination("http://old/", id=OLD))
    assert address() == f"{OLD} http://old/"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--from", "nobody", "--to", NEW), f"--from: must be one of {OLD}, {NEW}"),
        (("--from", OLD, "--to", "nobody"), f"--to: must be one of {OLD}, {NEW}"),
        (("--from", OLD, "--to", OLD), "--to: is the same as --from"),
        (("--from", NEW, "--to", OLD), "leads nowhere"),
    ],
)
def test_a_redirect_that_leads_nowhere_is_refused(
    tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    write_destination(tmp_path, destination("http://old/", id=OLD))
    write_destination(tmp_path, destination("http://new/", id=NEW))
    run("redirect", "--from", OLD, "--to", NEW, str(tmp_path))
    result = run("redirect", *options, str(tmp_path))
    assert result.returncode == os.EX_USAGE
    assert message in result.stderr
    found = read_destination(tmp_path, NEW)
    assert found is not None
    assert found.endpoint == "http://new/"
