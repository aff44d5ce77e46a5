"""How the gate's news reach Kong's shared dict, and what Kong reports, whatever happens to either."""

from __future__ import annotations

import socket
from pathlib import Path
from threading import Thread

import pytest

from tests.plugin.lua.gate_node import Node, Shell, UnixPeer
from tests.plugin.lua.scripted_gate import HEAD_END, ScriptedGate, line, response, settings
from tests.plugin.lua.test_gate import PASS, fed, statuses

# News


def test_news_reach_kong_while_the_poll_waits(gate: ScriptedGate, shell: Shell) -> None:
    gate.allow("alice")
    node = fed(gate, shell)
    assert node.request("alice").passed
    gate.deny("alice", "NO_CREDIT_AVAILABLE")
    node.run(0.2)
    assert node.request("alice").status == 402


def test_only_one_worker_polls_and_every_worker_decides_by_it(gate: ScriptedGate, shell: Shell) -> None:
    gate.allow("alice", 3)
    node = fed(gate, shell, workers=4)
    node.run(10)
    assert len({request.query["kong"] for request in gate.requests}) == 1
    assert 4 <= sum(request.path == "/v1/feed" for request in gate.requests) <= 8  # each waits 2 s
    assert statuses(node, "alice", 8) == [PASS] * 3 + [429] * 5


def test_a_state_of_many_slices_is_fresh_only_when_it_is_whole(gate: ScriptedGate) -> None:
    gate.settings = settings(unseen="deny")
    gate.slice_size = 10
    for number in range(100):
        gate.allow(f"c{number}")
    gate.feeds_left = 3
    node = Node(gate)
    node.run(1)
    assert (node.get("since_number"), node.get("at")) == (30, None)
    assert node.request("c99").passed  # its line is on the way: a half state denies nobody
    gate.feeds_left = None
    node.run(6)
    assert node.get("at") is not None
    assert {node.request(f"c{number}").status for number in range(100)} == {PASS}
    assert node.request("other").status == 403


def test_a_full_state_forgets_whom_it_does_not_name(gate: ScriptedGate) -> None:
    gate.allow("alice", 1)
    gate.deny("bob", "FEATURE_UNAVAILABLE")
    node = fed(gate)
    assert statuses(node, "alice", 2) == [PASS, 429]
    gate.restart(2)
    gate.allow("carol", 1)
    node.run(2.5)
    assert node.request("alice").passed
    assert node.request("bob").passed
    assert [node.get(key) for key in ("k\talice", "c\trequests\talice", "p\trequests\talice", "k\tbob")] == [
        None
    ] * 4
    assert statuses(node, "carol", 2) == [PASS, 429]


def test_a_subject_and_an_account_can_be_forgotten(gate: ScriptedGate) -> None:
    gate.deny("alice", "FEATURE_UNAVAILABLE")
    gate.deny("bob", "FEATURE_UNAVAILABLE")
    node = fed(gate)
    gate.send(line("X", "alice"))
    gate.send(line("Y", "bob"))
    node.run(0.2)
    assert node.request("alice").passed
    assert node.request("bob").passed


def test_a_raised_ceiling_lets_exactly_the_rest_pass(gate: ScriptedGate, shell: Shell) -> None:
    gate.allow("alice", 5)
    node = fed(gate, shell)
    statuses(node, "alice", 3)
    node.run(1)
    assert gate.counters["alice", "requests"] == 3
    statuses(node, "alice", 1)
    gate.allow("alice", 10, 3)  # does not know of the fourth
    node.run(0.2)
    assert statuses(node, "alice", 11) == [PASS] * 9 + [429] * 2


def test_after_its_own_restart_the_gate_never_raises_what_kong_still_counts_to(gate: ScriptedGate) -> None:
    gate.allow("alice", 5)
    node = fed(gate)
    assert statuses(node, "alice", 4) == [PASS] * 4
    gate.restart(2)
    gate.allow("alice", 5, "-")  # the records of these 4 have not reached it
    node.run(2.5)
    assert gate.counters["alice", "requests"] == 4  # reported after the full state
    assert statuses(node, "alice", 3) == [PASS] + [429] * 2


def test_new_settings_reach_every_worker_at_once_and_old_ones_are_forgotten(
    gate: ScriptedGate, shell: Shell
) -> None:
    gate.deny("alice", "FEATURE_UNAVAILABLE")
    node = fed(gate, shell)
    assert statuses(node, "alice", 2) == [403, 403]
    changed = [each for each in settings("2") if not each.startswith(("R", "W"))] + [
        "R\troute\tother\trequests"
    ]
    gate.configure([*changed, line("W", "FEATURE_UNAVAILABLE", 451, "Gone")])
    node.run(0.3)
    assert statuses(node, "alice", 2) == [PASS, PASS]
    answer = node.request("alice", on_route="other")
    assert (answer.status, answer.message) == (451, "Gone")


# Kong


@pytest.mark.parametrize("shell", ["plugin", "post-function"])
def test_a_reload_of_kong_forgets_nothing_and_leaves_no_loop_behind(gate: ScriptedGate, shell: Shell) -> None:
    gate.allow("alice", 5)
    node = fed(gate, shell)
    assert statuses(node, "alice", 3) == [PASS] * 3
    node.reload()
    assert statuses(node, "alice", 4) == [PASS] * 2 + [429] * 2
    node.run(4)
    assert {len(worker[b"threads"]) for worker in node.old} == {0}
    assert node.threads == [2, 2]
    gate.allow("alice", 1, 5)
    node.run(0.3)
    assert statuses(node, "alice", 2) == [PASS, 429]


@pytest.mark.parametrize("shell", ["plugin", "post-function"])
def test_a_change_of_kongs_configuration_leaves_no_loop_behind_and_loses_no_report(
    gate: ScriptedGate, shell: Shell
) -> None:
    gate.allow("alice", 5)
    node = fed(gate, shell)
    for number in range(5):
        assert node.request("alice").passed
        node.configure(features=["requests"], mode="enforce" if number % 2 else "shadow")
        node.request("nobody")
        node.run(0.1)
    node.request("nobody", worker=1)
    node.run(4)
    assert node.threads == [2, 2]
    assert gate.counters["alice", "requests"] == 5


def test_a_killed_worker_is_replaced_in_its_feed_at_once(gate: ScriptedGate) -> None:
    gate.deny("alice", "FEATURE_UNAVAILABLE")
    node = fed(gate)
    node.kill(0)
    node.kill(1)
    gate.allow("alice")
    node.run(0.6)
    assert statuses(node, "alice", 2) == [PASS, PASS]


def test_what_a_killed_worker_had_not_reported_is_known_as_soon_as_it_matters(gate: ScriptedGate) -> None:
    gate.allow("alice", 5)
    node = fed(gate)
    assert statuses(node, "alice", 3) == [PASS] * 3
    node.kill(0)
    node.kill(1)
    gate.allow(
        "alice", 2, 0
    )  # from the records of the three, which are no part of the counter that the gate knows
    node.run(1)
    assert node.request("alice").status == 429
    node.run(1)
    assert gate.counters["alice", "requests"] == 3


def test_a_feeding_worker_that_is_gone_for_good_is_replaced_within_seconds(gate: ScriptedGate) -> None:
    gate.deny("alice", "FEATURE_UNAVAILABLE")
    node = fed(gate)
    gone = int(node.get("feeder"))
    node.workers[gone][b"exiting"] = True
    node.run(2.5)
    gate.allow("alice")
    node.run(7)
    assert node.request("alice", worker=1 - gone).passed


def test_an_answer_that_a_worker_reads_after_another_one_took_over_the_feed_changes_nothing(
    gate: ScriptedGate,
) -> None:
    gate.allow("alice")
    node = fed(gate)
    worker, known = node.workers[int(node.get("feeder"))], gate.number
    gate.deny("alice", "FEATURE_UNAVAILABLE")
    old = response(200, gate.feed(known, full=False))
    worker[b"stopped"] = True  # by SIGSTOP, or by a disk that hangs, with this answer in its socket
    gate.allow("alice")
    node.run(8)
    assert node.request("alice").passed
    gate.garbage = old
    node.globals[b"turn"](worker)
    gate.garbage = None
    assert node.request("alice").passed
    assert node.get("since_number") == gate.number
    worker[b"stopped"] = False
    gate.deny("alice", "FEATURE_UNAVAILABLE")
    node.run(0.3)
    assert node.request("alice").status == 403


def test_a_restart_of_kong_finds_the_last_state_in_the_state_file_before_the_first_request(
    gate: ScriptedGate, tmp_path: Path
) -> None:
    gate.settings = settings(unseen="deny")
    gate.deny("bob", "FEATURE_UNAVAILABLE")
    gate.allow("alice", 2, "-")
    path = tmp_path / "gate.sock"
    path.with_name("gate.sock.state").write_text(gate.feed())
    gate.state = "dead"
    node = Node(gate, path=str(path))
    assert node.request("bob").status == 403
    assert statuses(node, "alice", 3) == [PASS, PASS, 429]
    node.run(61)  # max_stale counts from the file's own time
    assert node.request("bob").passed


@pytest.mark.parametrize(
    "text", ["", "garbage\n", "openmeter-gate\t1\te\t1\tfull\tdone\t1\nA\tx\nend\t9\n", "\x00" * 100]
)
def test_a_damaged_state_file_is_as_none(gate: ScriptedGate, tmp_path: Path, text: str) -> None:
    path = tmp_path / "gate.sock"
    path.with_name("gate.sock.state").write_text(text)
    gate.state = "dead"
    node = Node(gate, path=str(path))
    assert node.request().passed
    assert node.get("at") is None
    assert any("state file cannot be read" in said for said in node.said)


def test_a_removed_plugin_ends_its_loops(gate: ScriptedGate) -> None:
    node = fed(gate)
    for worker in node.workers:
        worker[b"handler"][b"configure"](worker[b"handler"])
    node.run(3)
    assert node.threads == [0, 0]


# The gate


@pytest.mark.parametrize("state", ["dead", "hung", "starting"])
@pytest.mark.parametrize(("on_stale", "status"), [("allow", PASS), ("deny", 503)])
def test_a_gate_that_is_away_leaves_the_last_state_in_force_until_max_stale(
    gate: ScriptedGate, shell: Shell, state: str, on_stale: str, status: int
) -> None:
    gate.settings = settings(on_stale=on_stale, max_stale="30")
    gate.allow("alice", 3)
    gate.deny("bob", "FEATURE_UNAVAILABLE")
    node = fed(gate, shell)
    gate.state = state  # type: ignore[assignment]
    node.run(25)
    assert statuses(node, "alice", 4) == [PASS] * 3 + [429]
    assert node.request("bob").status == 403
    node.run(10)
    assert [node.request(who).status for who in ("alice", "bob", "new")] == [status] * 3
    gate.state = "up"
    node.run(6)
    assert [node.request(who).status for who in ("alice", "bob", "new")] == [429, 403, PASS]


GARBAGE = [
    b"",
    b"\x00\xff" * 100,
    b"HTTP/1.1 200 OK\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nshort",
    b"x" * 200_000,
    response(404, "no"),
    response(200, ""),
    response(200, "<html></html>\n"),
    response(200, "openmeter-gate\t1\te\t7\tfull\tdone\t1800000000.0\nend\t1\n"),
    response(200, "openmeter-gate\t2\te\t7\tfull\tdone\t1800000000.0\nend\t0\n"),
    response(200, "openmeter-gate\t1\te\t7\tfull\tdone\t1800000000.0\nD\talice\trequests\tSTALE\t0\n"),
]


@pytest.mark.parametrize("garbage", GARBAGE)
def test_an_answer_that_is_not_whole_changes_nothing(
    gate: ScriptedGate, shell: Shell, garbage: bytes
) -> None:
    gate.allow("alice", 2)
    node = fed(gate, shell)
    gate.garbage = garbage
    node.run(20)
    assert statuses(node, "alice", 3) == [PASS, PASS, 429]
    assert any("no news from the gate" in said for said in node.said)
    gate.garbage = None
    gate.allow("alice", 1, 2)
    node.run(7)
    assert statuses(node, "alice", 2) == [PASS, 429]
    assert gate.figures["feed_errors"] > 0


@pytest.mark.parametrize(
    "bad",
    [
        *("A", "D", "K", "X", "Y", "A\talice", "A\talice\trequests", "D\talice\trequests", "?\t1"),
        *(
            "A\talice\trequests\tnan\t0\t0\t-",
            "A\talice\trequests\t0x1\t0\t0\t-",
            "A\talice\trequests\t0\tinf\t0\t-",
        ),
        *("A\talice\trequests\t0\t0\t-1\t-", "A\talice\trequests\t0\t0\t99999999999\t-"),
        *("D\talice\trequests\tno such\t0", "D\talice\t\tSTALE\t0"),
    ],
)
def test_a_line_that_cannot_be_read_costs_only_itself(gate: ScriptedGate, bad: str) -> None:
    gate.allow("alice", 2)
    gate.send(bad)
    gate.deny("bob", "FEATURE_UNAVAILABLE")
    node = fed(gate)
    assert statuses(node, "alice", 3) == [PASS, PASS, 429]
    assert node.request("bob").status == 403


def test_more_fields_and_unknown_lines_are_for_later_versions(gate: ScriptedGate) -> None:
    gate.account("alice", "alice")
    gate.send("A\talice\trequests\t1\t0\t0\t-\tnew field")
    gate.send("N\tnew line")
    node = fed(gate)
    assert statuses(node, "alice", 2) == [PASS, 429]
    node.run(1)
    assert gate.figures["feed_errors"] == 0


def test_a_clock_that_is_set_back_does_not_hide_a_dead_gate(gate: ScriptedGate) -> None:
    gate.settings = settings(on_stale="deny")
    gate.allow("alice")
    node = fed(gate)
    gate.state = "dead"
    node.now -= 3600
    assert node.request("alice").passed
    node.run(70)
    assert node.request("alice").status == 503


# Reports


def test_reports_count_everything_once_though_the_gate_refuses_some(gate: ScriptedGate, shell: Shell) -> None:
    gate.allow("alice", 50)
    gate.deny("bob", "FEATURE_UNAVAILABLE")
    node = fed(gate, shell)
    node.run(10)
    before = gate.figures["passed"]
    gate.refused_reports = 5
    for number in range(40):
        node.request("alice", worker=number % 2)
        node.request("bob", worker=number % 2)
        node.run(0.2)
    node.run(2)
    assert gate.refused_reports == 0
    assert gate.counters["alice", "requests"] == 40
    assert gate.stops == {("bob", "requests", "FEATURE_UNAVAILABLE", "enforce"): 40}
    assert gate.figures["passed"] - before == 40


def test_a_new_dict_is_reported_only_after_its_first_answer_so_that_the_gate_knows_it_from_its_beginning(
    gate: ScriptedGate, shell: Shell
) -> None:
    gate.state = "dead"
    node = Node(gate, shell=shell)
    for worker in (0, 1):
        node.request(worker=worker)
    node.run(3)
    gate.state, gate.feeds_left = "up", 0
    node.run(1.5)  # the long poll waits longer than this
    assert {request.path for request in gate.requests} == {"/v1/feed"}
    gate.feeds_left = None
    node.run(9)
    assert gate.figures["feed_errors"] >= 3


def test_an_active_subject_is_reported_every_ten_seconds_by_each_worker_and_no_more(
    gate: ScriptedGate,
) -> None:
    gate.allow("alice")
    node = fed(gate)
    for _ in range(300):
        statuses(node, "alice", 2)
        node.run(0.1)
    assert 6 <= gate.seen["alice"] <= 8


def test_an_idle_worker_reports_nothing(gate: ScriptedGate) -> None:
    node = fed(gate)
    node.run(5)
    gate.requests.clear()
    node.run(60)
    assert {request.path for request in gate.requests} == {"/v1/feed"}


def test_a_long_report_is_sent_in_parts(gate: ScriptedGate) -> None:
    node = fed(gate)
    for number in range(4500):
        node.request(f"c{number}")
    node.run(1)
    sizes = [request.body.count("\n") for request in gate.requests if request.path == "/v1/report"]
    assert max(sizes) == 2002
    assert sum(gate.seen[f"c{number}"] for number in range(4500)) == 4500


def test_what_is_kept_for_a_gate_that_is_away_is_bounded(gate: ScriptedGate) -> None:
    gate.allow("alice", 10)
    node = fed(gate)
    gate.state = "dead"
    for number in range(30_000):
        node.request(f"c{number}")
        if number % 1000 == 0:
            node.run(0.5)
    node.request("alice")
    gate.state = "up"
    node.run(2)
    assert 5_000 <= len(gate.seen) <= 20_000
    assert gate.counters["alice", "requests"] == 1


# The dict


def test_a_full_dict_evicts_nothing_and_new_customers_count_as_unseen(
    gate: ScriptedGate, shell: Shell
) -> None:
    gate.allow("alice", 5)
    node = fed(gate, shell, entries=200)
    assert statuses(node, "alice", 2) == [PASS, PASS]
    for number in range(500):
        gate.allow(f"c{number}", 0)
    gate.deny("late", "FEATURE_UNAVAILABLE")
    node.run(2)
    assert statuses(node, "alice", 4) == [PASS] * 3 + [429]
    assert node.request("c0").status == 429
    assert node.request("late").passed
    assert any("is full" in said for said in node.said)
    assert gate.figures["no_memory"] > 0
    gate.configure(settings("2", mode="shadow"))  # the bookkeeping goes on
    node.run(1)
    assert node.request("alice").passed


# A real socket


def served(path: Path, gate: ScriptedGate, piece: int) -> socket.socket:
    """Serve a gate on a Unix socket that sends its answers in pieces."""
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    server.listen()

    def serve(client: socket.socket) -> None:
        link, got = gate.connect(""), b""
        with client:
            while data := client.recv(65_536):
                got += data
                head, end, body = got.partition(HEAD_END)
                length = [
                    int(one[15:]) for one in head.split(b"\r\n") if one.lower().startswith(b"content-length:")
                ]
                if not end or len(body) < sum(length) or link is None:
                    continue
                link.send(got)
                got, answer = b"", b""
                while (part := link.receive(65_536, False)) or not answer:
                    answer += part or b""
                for start in range(0, len(answer), piece):
                    client.sendall(answer[start : start + piece])

    def accept() -> None:
        while True:
            try:
                client, _ = server.accept()
            except OSError:
                return
            Thread(target=serve, args=[client], daemon=True).start()

    Thread(target=accept, daemon=True).start()
    return server


@pytest.mark.parametrize("piece", [7, 4096])
def test_over_a_real_socket_answers_may_come_in_pieces(
    gate: ScriptedGate, tmp_path: Path, piece: int
) -> None:
    for number in range(200):
        gate.allow(f"c{number}", 1)
    path = tmp_path / "gate.sock"
    with served(path, gate, piece), UnixPeer() as peer:
        node = Node(peer, workers=1, path=str(path))
        node.run(1)
        assert [statuses(node, f"c{number}", 2) for number in (0, 199)] == [[PASS, 429]] * 2
        node.run(1)
    assert gate.counters == {(f"c{number}", "requests"): 1 for number in (0, 199)}
