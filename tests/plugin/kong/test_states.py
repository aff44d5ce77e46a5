"""Connections and instances follow the tables of their states, and so does the documentation."""

from __future__ import annotations

import asyncio
from pathlib import Path

import orjson
import pytest

from openmeter_plugin.instances.instance import Instance, InstanceIds, Instances
from openmeter_plugin.instances.store import InstanceFiles, InstanceFinder
from openmeter_plugin.kong.codec import ProtocolError
from openmeter_plugin.kong.states import CONNECTION, INSTANCE, InstanceSignal, InstanceState, Signal, State
from tests.plugin.serving import Serving, serve
from tests.plugin.spools import running_writer
from tests.state_diagrams import PAGE, written

CONFIG = orjson.dumps({"ingest_endpoint": "http://a.example/"})


def test_the_diagrams_of_the_page_are_those_of_the_tables() -> None:
    assert written(PAGE.read_text()) == PAGE.read_text(), "run python -m tests.state_diagrams"


def test_each_state_can_be_reached_and_left() -> None:
    steps = [step for row in CONNECTION.values() for step in row.items()]
    assert {following for _, following in steps} == set(State)
    assert {state for state, _ in steps} == set(State) - {State.CLOSED}


@pytest.mark.parametrize("state", State)
def test_a_signal_that_the_table_does_not_allow_is_an_error_of_the_protocol(
    tmp_path: Path, state: State
) -> None:
    async def test(serving: Serving) -> None:
        peer = serving.connect()
        (connection,) = serving.handlers
        for signal in Signal:
            connection.state = state
            following = CONNECTION[signal].get(state)
            if following is None:
                with pytest.raises(ProtocolError):
                    connection.signal(signal)
            else:
                connection.signal(signal)
                assert connection.state is following
        connection.state = State.IDLE
        peer.close()

    serve(tmp_path, test)


class Known:
    """What a worker knows about one instance id, and what can happen to it."""

    def __init__(self, spool: Path, instances: Instances) -> None:
        loop = asyncio.get_running_loop()
        self.id = 7
        self.instances = instances
        self.files = InstanceFiles(spool, loop)
        self.files.start()
        self._finder = InstanceFinder(self.files, instances, loop)
        self._found: asyncio.Future[Instance | None] | None = None

    @property
    def state(self) -> InstanceState:
        if self._found is not None:
            return InstanceState.SEARCHED
        known = self.instances.get(self.id) is not None
        return InstanceState.SERVED if known else InstanceState.UNKNOWN

    async def happens(self, signal: InstanceSignal) -> None:
        if signal in (InstanceSignal.START, InstanceSignal.ANNOUNCED):
            self.instances.adopt(self.id, CONFIG)
        elif signal is InstanceSignal.EVENT:
            if self.instances.get(self.id) is None and self._found is None:
                self._found = asyncio.get_running_loop().create_future()
                self._finder.find(self.id, self._found.set_result)
        elif signal in (InstanceSignal.FOUND, InstanceSignal.MISSING):
            assert self._found is not None
            found = await self._found
            assert (found is not None) == (signal is InstanceSignal.FOUND)
            self._found = None
        elif signal is InstanceSignal.CLOSE:
            self.instances.close(self.id)
        else:
            self.instances.forget_unused()
            self.instances.forget_unused()

    async def enter(self, state: InstanceState, signal: InstanceSignal) -> None:
        if state is InstanceState.SERVED:
            self.instances.adopt(self.id, CONFIG)
        elif state is InstanceState.SEARCHED:
            if signal is InstanceSignal.FOUND:
                self.files.save(self.id, CONFIG)
            await self.happens(InstanceSignal.EVENT)


STEPS = [(state, signal, following) for signal, row in INSTANCE.items() for state, following in row.items()]


@pytest.mark.parametrize(("state", "signal", "following"), STEPS)
def test_what_a_worker_knows_about_an_instance_follows_the_table(
    tmp_path: Path, state: InstanceState, signal: InstanceSignal, following: InstanceState
) -> None:
    async def body(instances: Instances) -> None:
        known = Known(tmp_path, instances)
        assert known.state is InstanceState.UNKNOWN
        await known.enter(state, signal)
        assert known.state is state
        await known.happens(signal)
        assert known.state is following
        known.files.close(10)

    with running_writer(tmp_path) as writer:
        asyncio.run(body(Instances(InstanceIds(tmp_path), writer)))
