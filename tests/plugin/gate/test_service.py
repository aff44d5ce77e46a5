"""The gate's loops: saving its state and showing it hold up nothing else, and miss nothing."""

from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import httpx
import pytest

from openmeter_plugin.gate import lines, overrides
from openmeter_plugin.gate.accounts import Key, Reading, Reason
from openmeter_plugin.gate.client import Access
from openmeter_plugin.gate.counting import _amount
from openmeter_plugin.gate.counts import Segment
from openmeter_plugin.gate.process import create_app
from openmeter_plugin.gate.service import Gate
from openmeter_plugin.gate.settings import Settings, Unit
from openmeter_plugin.gate.view import view
from syncd.sandbox.testing import running_sandbox

SUBJECTS = 3_000


def settings(folder: Path, **more: Any) -> Settings:
    given = {"metering": {"url": "http://127.0.0.1:9"}, "features": [{"key": "api"}]}
    return Settings.model_validate(given | {"mode": "enforce", "socket": str(folder / "gate.sock"), **more})


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    made = Gate(settings(tmp_path), tmp_path)
    made.restore()
    now = asyncio.run(_clock())
    for number in range(SUBJECTS):
        made.schedule.seen(f"s{number}", now)
        made.accounts.assign(f"s{number}", f"a{number}", now)
        reason = Reason.USAGE_LIMIT_REACHED if number < 5 else None
        reading = Reading(now, reason, exact=True, balance=float(number), quota=1_000.0)
        made.accounts.apply(Key(f"a{number}", "api"), reading, now)
    return made


async def _clock() -> float:
    return asyncio.get_running_loop().time()


def turns_during(work: Awaitable[Any]) -> int:
    """Return how often other work on the event loop got its turn."""

    async def run() -> int:
        turns = 0
        task = asyncio.ensure_future(work)
        while not task.done():
            await asyncio.sleep(0)
            turns += 1
        await task
        return turns

    return asyncio.run(run())


def test_saving_the_state_lets_other_work_through_and_the_next_process_has_all_of_it(
    gate: Gate, tmp_path: Path
) -> None:
    lot = gate.accounts.lots.current(0)
    gate.accounts.count("a900", {"api": 7.0}, 7, lot, 0)
    assert turns_during(gate._save_in_pieces()) > SUBJECTS / 500
    again = Gate(settings(tmp_path), tmp_path)
    again.restore()
    assert again.accounts.subjects == gate.accounts.subjects
    assert again.accounts.left(again.accounts.entries[Key("a900", "api")]) == 893
    state = (tmp_path / "gate.sock.state").read_text()
    assert state.count("\nA\t") + state.count("\nD\t") == state.count("\nK\t") == SUBJECTS
    head, *rest, end = state.rstrip("\n").split("\n")
    assert head.startswith("openmeter-gate\t1\t")
    assert end == lines.end(len(rest))


def test_nothing_is_counted_while_the_state_is_saved_so_that_counts_and_positions_agree(gate: Gate) -> None:
    async def run() -> None:
        await gate._counting.acquire()
        saving = asyncio.ensure_future(gate._save_in_pieces())
        for _ in range(50):
            await asyncio.sleep(0)
        assert not (gate.directory / "state-1.json").exists()
        gate._counting.release()
        await saving
        assert (gate.directory / "state-1.json").exists()

    asyncio.run(run())


def test_kong_gets_all_of_a_full_state_although_thousands_of_newer_names_were_forgotten(gate: Gate) -> None:
    for number in range(SUBJECTS):
        gate.accounts.assign(f"gone{number}", "gone", 0)
    for number in range(SUBJECTS):
        gate.accounts.forget(f"gone{number}")
    gate.accounts.changes.forget_oldest(SUBJECTS, gate.accounts._is_live)

    async def run() -> None:
        query, named, epoch, more = {"kong": "k", "wait": "0", "since": "0.0"}, 0, "", "more"
        kinds: list[str] = []
        transport = httpx.ASGITransport(create_app(gate))
        async with httpx.AsyncClient(transport=transport, base_url="http://gate") as api:
            while more == "more" and len(kinds) < 10:
                head, *found = (await api.get("/v1/feed", params=query)).text.splitlines()
                _, _, epoch, number, kind, more, _ = head.split("\t")
                kinds.append(kind)
                named += sum(line.startswith("K\t") for line in found)
                query["since"] = f"{epoch}.{number}"
        assert kinds == ["full"] + ["changes"] * (len(kinds) - 1)
        assert (named, epoch, more) == (SUBJECTS, gate.kongs.epoch, "done")

    asyncio.run(run())


def test_what_waits_for_delivery_stays_taken_off_however_long_its_subject_is_idle(gate: Gate) -> None:
    lot = gate.accounts.lots.current(0)
    gate.accounts.lots.ends_at(lot, Segment("queue", "1"), 100)
    gate.accounts.count("a900", {"api": 7.0}, 7, lot, 0)
    gate.accounts.count("unanswered", {"api": 7.0}, 7, lot, 0)
    gate.schedule.seen("unanswered", time.monotonic())
    later = time.monotonic() + gate.settings.forget_after + 10
    gate._tidy(later)
    assert gate.accounts.subjects == {"s900": "a900"}
    assert gate.accounts.entries.keys() == {Key("a900", "api"), Key("unanswered", "api")}
    assert gate.accounts.left(gate.accounts.entries[Key("a900", "api")]) == 893
    gate.accounts.lots.note_delivered(lambda *_: True, later)
    gate._tidy(later + gate.settings.counted_after)
    assert gate.accounts.entries == {}
    assert gate.schedule.last_seen == {}


@pytest.mark.parametrize(
    "value", [float("inf"), "1e999", "nan", -5, pytest.param(10**400, id="huge"), True, None, "many", [3]]
)
def test_an_amount_that_makes_no_sense_is_not_counted(value: Any) -> None:
    assert _amount(Unit(event="e", value="tokens"), {"tokens": value}) == 0
    assert _amount(Unit(event="e", value="tokens"), {"tokens": "12.5"}) == 12.5


def is_allowed(gate: Gate) -> bool:
    """Return whether the customer with nothing left, a0, may still call."""
    decision = gate.accounts.decide(Key("a0", "api"), time.monotonic())
    assert decision is not None
    return decision.reason is None


def test_a_customer_is_allowed_everything_until_the_last_override_of_its_subjects_ends(gate: Gate) -> None:
    gate.accounts.assign("other", "a0", 0)
    gate.allow("s0", 3600, "long", "")
    gate.allow("other", 60, "short", "")
    assert gate.end_override("other")
    assert is_allowed(gate)
    gate.allow("other", 0.001, "very short", "")
    time.sleep(0.002)
    gate.expire()
    assert is_allowed(gate)
    assert gate.end_override("s0")
    assert not is_allowed(gate)


def test_an_override_that_was_ended_stays_ended_although_the_gate_is_killed_before_it_saves(
    gate: Gate, tmp_path: Path
) -> None:
    gate.allow("s0", 3600, "a test", "")
    gate.save()
    assert gate.end_override("s0")
    again = Gate(settings(tmp_path), tmp_path)
    again.restore()
    assert not is_allowed(again)


def test_an_override_of_a_subject_not_yet_known_is_that_of_its_customer(gate: Gate) -> None:
    gate.allow("new", 3600, "a test", "")
    gate._take_access([Access("new", "a0", {})])
    assert is_allowed(gate)
    assert gate.accounts.overrides.keys() == {"a0"}


def test_an_override_ends_also_while_its_file_cannot_be_written(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate.allow("s0", 0.001, "a test", "")
    time.sleep(0.002)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(overrides, "write_atomically", full)
    gate.expire()
    assert not is_allowed(gate)
    assert gate.overrides.all() == []


def test_an_override_that_cannot_be_written_is_refused_and_changes_nothing(gate: Gate) -> None:
    async def run() -> None:
        transport = httpx.ASGITransport(create_app(gate))
        async with httpx.AsyncClient(transport=transport, base_url="http://gate") as api:
            body = {"subject": "s0", "seconds": 60, "why": "a test"}
            path = gate.directory / "overrides.json"
            path.mkdir()  # so that no file can take its place
            refused = await api.post("/v1/gate/overrides", json=body)
            assert (refused.status_code, is_allowed(gate)) == (503, False)
            path.rmdir()
            assert (await api.post("/v1/gate/overrides", json=body)).status_code == 201
            path.unlink()
            path.mkdir()
            refused = await api.delete("/v1/gate/overrides", params={"subject": "s0"})
            assert (refused.status_code, is_allowed(gate)) == (503, True)
            assert "the overrides cannot be written: Is a directory" in refused.json()["detail"]

    asyncio.run(run())


@pytest.mark.slow
def test_all_calls_stay_within_max_calls_also_where_each_subject_takes_several(tmp_path: Path) -> None:
    async def run(url: str) -> None:
        given = {"url": url, "dialect": "openmeter-v1"}
        made = Gate(settings(tmp_path, metering=given, max_calls=50, refresh=60), tmp_path)
        began = time.monotonic()
        for number in range(40):
            made.schedule.seen(f"s{number}", began)
        task = asyncio.ensure_future(made.run())
        while len(made.accounts.subjects) < 40:
            assert time.monotonic() < began + 20
            await asyncio.sleep(0.02)
        calls = sum(made.client.calls.values())
        took = time.monotonic() - began
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert calls >= 80
        assert calls <= 50 * (took + 0.25) + 13

    with running_sandbox() as url:
        asyncio.run(run(url))


def test_the_view_lets_other_work_through_and_shows_who_is_stopped_and_who_is_close(gate: Gate) -> None:
    assert turns_during(view(gate)) > SUBJECTS / 500
    shown = asyncio.run(view(gate))
    assert [item["subjects"] for item in shown["denied"]] == [[f"s{number}"] for number in range(5)]
    assert [item["left"] for item in shown["close"]] == list(range(5, 100))
