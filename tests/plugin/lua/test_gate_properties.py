"""Counting, whatever the order of requests, news, reports and restarts: never too much, and never too little.

The gate of these tests grants each account a total, which only grows. It sends ceilings as docs/gate.md says:
what is left of the total after the counter that it knows, or, after its own restart, after the records that
reached it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.plugin.lua.gate_node import SHELLS, Node, Shell
from tests.plugin.lua.scripted_gate import ScriptedGate, line
from tests.plugin.lua.scripted_gate import settings as gate_settings

WHO = ("alice", "bob")
FEATURES = ("requests", "tokens")
Key = tuple[str, str]


@dataclass
class World:
    """A node, its gate, and what is true."""

    shell: Shell
    gate: ScriptedGate = field(default_factory=lambda: ScriptedGate(slice_size=3))
    passed: dict[Key, int] = field(default_factory=lambda: {(who, one): 0 for who in WHO for one in FEATURES})
    total: dict[Key, int] = field(default_factory=lambda: {(who, one): 4 for who in WHO for one in FEATURES})
    recorded: dict[Key, int] = field(default_factory=dict)
    epoch: int = 1

    def __post_init__(self) -> None:
        self.gate.settings = gate_settings(features=",".join(FEATURES))
        for who in WHO:
            self.gate.account(who, who)
        for key in self.total:
            self.send(key)
        self.node = Node(self.gate, shell=self.shell)
        for worker in (0, 1):
            self.node.request("nobody", worker=worker)
        self.node.run(2)

    def send(self, key: Key) -> None:
        who, feature = key
        if key in self.gate.counters or self.epoch == 1:
            base = int(self.gate.counters.get(key, 0))
            self.gate.allow(who, self.total[key] - base, base, feature=feature)
        else:  # restarted: it knows only the records
            self.gate.allow(who, self.total[key] - self.recorded.get(key, 0), "-", feature=feature)

    # What can happen

    def request(self, who: str, worker: int) -> None:
        answer = self.node.request(who, worker=worker)
        if answer.passed:
            for feature in FEATURES:
                self.passed[who, feature] += 1
                assert self.passed[who, feature] <= self.total[who, feature]

    def top_up(self, who: str, feature: str, more: int) -> None:
        self.total[who, feature] += more
        self.send((who, feature))

    def refresh(self, who: str, feature: str) -> None:
        self.send((who, feature))

    def records_arrive(self) -> None:
        self.recorded = dict(self.passed)

    def restart_gate(self) -> None:
        self.epoch += 1
        self.gate.restart(self.epoch)
        for who in WHO:
            self.gate.account(who, who)
        for key in self.total:
            self.send(key)

    def settle(self) -> None:
        """Let all reports and news arrive."""
        self.gate.state, self.gate.garbage = "up", None
        self.node.run(8)
        for key in self.total:
            self.send(key)
        self.node.run(3)


def steps() -> st.SearchStrategy[tuple[str, ...]]:
    who, feature = st.sampled_from(WHO), st.sampled_from(FEATURES)
    return st.one_of(
        *(st.tuples(st.just("request"), who, st.sampled_from((0, 1))) for _ in range(4)),
        st.tuples(st.just("wait"), st.sampled_from((0.05, 0.3, 0.6, 3.0))),
        st.tuples(st.just("top_up"), who, feature, st.integers(1, 3)),
        st.tuples(st.just("refresh"), who, feature),
        st.tuples(st.sampled_from(("records", "gate", "reload", "kill", "configure", "refuse"))),
        st.tuples(st.just("state"), st.sampled_from(("up", "up", "dead", "hung", "garbage"))),
    )


def do(world: World, step: tuple[object, ...]) -> None:
    name, *rest = step
    match name:
        case "request":
            world.request(*rest)  # type: ignore[arg-type]
        case "wait":
            world.node.run(*rest)  # type: ignore[arg-type]
        case "top_up":
            world.top_up(*rest)  # type: ignore[arg-type]
        case "refresh":
            world.refresh(*rest)  # type: ignore[arg-type]
        case "records":
            world.records_arrive()
        case "gate":
            world.restart_gate()
        case "reload":
            world.node.reload()
        case "kill":
            world.node.kill(0)
        case "configure":
            world.node.configure()
        case "refuse":
            world.gate.refused_reports = 2
        case "state":
            world.gate.garbage = b"HTTP/1.1 200 OK\r\n" if rest == ["garbage"] else None
            world.gate.state = "up" if rest == ["garbage"] else rest[0]  # type: ignore[assignment]


@pytest.mark.slow
@pytest.mark.parametrize("shell", SHELLS)
@given(history=st.lists(steps(), max_size=60))
@settings(max_examples=100, deadline=None)
def test_never_more_than_granted_passes_and_in_the_end_exactly_that(
    shell: Shell, history: list[tuple[object, ...]]
) -> None:
    world = World(shell)
    for step in history:
        do(world, step)
    world.settle()
    if ("kill",) not in history:  # what a killed worker had not reported is known with the next request
        assert {key: world.gate.counters.get(key, 0) for key in world.passed} == world.passed
    for who in WHO:
        world.request(who, 0)
    world.settle()
    for who in WHO:
        for number in range(40):
            world.request(who, number % 2)
        # A request needs both features, so the scarcer one decides.
        least = min(world.total[who, feature] for feature in FEATURES)
        assert {world.passed[who, feature] for feature in FEATURES} == {least}


def test_a_ceiling_is_exact_however_many_requests_pass_before_it_arrives() -> None:
    for late in range(5):
        gate = ScriptedGate()
        gate.allow("alice", 6)
        node = Node(gate)
        node.run(1)
        for _ in range(2):
            node.request("alice")
        node.run(1)
        base = int(gate.counters["alice", "requests"])
        for _ in range(late):
            node.request("alice")
        gate.send(line("A", "alice", "requests", 10 - base, base, 0, "-"))
        node.run(0.2)
        passed = 2 + late + sum(node.request("alice").passed for _ in range(20))
        assert passed == 10
