"""What the next server knows of the instances that Kong has started, and what it is never told."""

from __future__ import annotations

import asyncio
import os
import stat
from pathlib import Path

import orjson
import pytest

from openmeter_plugin.config.instance_config import parse_config, parse_object
from openmeter_plugin.instances import store
from openmeter_plugin.instances.instance import InstanceIds, Instances
from openmeter_plugin.instances.store import InstanceFiles, InstanceFinder, restored, without_token
from syncd.sandbox.testing import running_sandbox
from tests.harness.kong import KongWorker, PluginInstance, drive
from tests.harness.process import PluginServer, eventually, plugin_server
from tests.harness.recordings import WIRE
from tests.plugin.spools import running_writer
from tests.plugin.traffic import TOKEN, plugin, request, stored


def only_file(server: PluginServer) -> Path:
    (path,) = eventually(lambda: list(server.spool.glob("instances/*.json")), what="the file")
    return path


def handed_over(server: PluginServer, instance: PluginInstance, number: int) -> KongWorker:
    async def run() -> KongWorker:
        worker = KongWorker(server.socket)
        recorded, tag = request(number)
        await drive(worker, [(instance, recorded, tag)], concurrency=1)
        await worker.close()
        return worker

    return asyncio.run(run())


def test_the_next_server_knows_the_instances_of_the_one_before_and_no_file_of_theirs_has_the_token(
    tmp_path: Path,
) -> None:
    with running_sandbox(token=TOKEN) as sandbox:
        instance = plugin(sandbox)
        with plugin_server(tmp_path) as server:
            assert handed_over(server, instance, 0).tally.lost == []
            path = only_file(server)
            assert path.stem == str(instance.instance_id)
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
            assert TOKEN not in path.read_text()
            eventually(lambda: stored(sandbox) == 1, what="the arrival")
        with plugin_server(tmp_path) as server:
            tally = handed_over(server, instance, 1).tally
            assert (tally.lost, tally.resent) == ([], 0)
            eventually(lambda: stored(sandbox) == 2, what="the arrival, with the token of before")


def test_of_an_instance_that_kong_has_closed_nothing_stays(tmp_path: Path) -> None:
    with running_sandbox(token=TOKEN) as sandbox, plugin_server(tmp_path) as server:
        instance = plugin(sandbox)
        handed_over(server, instance, 0)
        path = only_file(server)

        async def close() -> None:
            worker = KongWorker(server.socket)
            await worker.close_instance(int(path.stem))
            await worker.close()

        asyncio.run(close())
        eventually(lambda: not path.exists(), what="the removal")


@pytest.mark.parametrize(
    "content", [None, b"", b"{}", b"\xff", b'{"config": {}, "keeps_token": true}', b"[]"]
)
def test_where_the_file_of_an_instance_cannot_be_used_kong_starts_it_again(
    tmp_path: Path, content: bytes | None
) -> None:
    with running_sandbox(token=TOKEN) as sandbox:
        instance = plugin(sandbox)
        with plugin_server(tmp_path) as server:
            handed_over(server, instance, 0)
            path = only_file(server)
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        with plugin_server(tmp_path) as server:
            tally = handed_over(server, instance, 1).tally
            assert (tally.lost, tally.resent) == ([], 1)


def test_what_is_kept_of_a_configuration_makes_the_same_rules() -> None:
    recorded = orjson.loads((WIRE / "start-instance-full-schema.json").read_bytes())
    for config in (
        recorded,
        {"ingest_endpoint": "http://a.example/", "$refs": {"api_token": "{vault://e/t}"}},
    ):
        raw = orjson.dumps(config | {"ingest_endpoint": "http://a.example/", "api_token": TOKEN})
        kept = without_token(raw)
        assert kept is not None
        known = restored(kept)
        assert known is not None
        assert known[1]
        assert parse_config(parse_object(known[0]))[1] == parse_config(parse_object(raw))[1]
        assert TOKEN.encode() not in kept


def test_a_configuration_that_cannot_be_used_is_not_kept() -> None:
    assert without_token(b'{"ingest_endpoint": 7, "secret": "s"}') is None
    assert without_token(b"no JSON") is None


def test_files_that_no_server_has_touched_for_long_are_removed_and_those_in_use_are_not(
    tmp_path: Path,
) -> None:
    async def body() -> None:
        files = InstanceFiles(tmp_path, asyncio.get_running_loop())
        files.start()
        for number in (1, 2, 3):
            files.keep(number, b'{"ingest_endpoint": "http://a.example/"}')
        files.close(10)
        for number in (1, 2):
            os.utime(tmp_path / "instances" / f"{number}.json", (0, 0))
        files = InstanceFiles(tmp_path, asyncio.get_running_loop())
        files.start()
        files.sweep([1, 9])
        files.close(10)

    asyncio.run(body())
    left = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "instances").iterdir()}
    assert left == {"1.json": 0o600, "3.json": 0o600}


def test_whether_a_token_belongs_to_an_instance_is_kept_and_nothing_that_stands_in_its_place() -> None:
    reference = {"$refs": {"api_token": "{vault://e/t}"}}
    for config, had_token in (
        ({}, False),
        ({"api_token": TOKEN}, True),
        ({"api_token": ""} | reference, True),
    ):
        kept = without_token(orjson.dumps({"ingest_endpoint": "http://a.example/"} | config))
        assert kept is not None
        known = restored(kept)
        assert known is not None
        assert known[1] is had_token
        assert "api_token" not in orjson.loads(known[0])


def test_an_instance_whose_file_cannot_be_read_in_time_is_started_again_by_kong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_MAX_LOOK", 0.02)

    async def body() -> list[object]:
        loop = asyncio.get_running_loop()
        files = InstanceFiles(tmp_path, loop)  # whose thread hangs, as it were: it is not started
        told: list[object] = []
        with running_writer(tmp_path) as writer:
            finder = InstanceFinder(files, Instances(InstanceIds(tmp_path), writer), loop)
            finder.find(7, told.append)
            finder.find(7, told.append)
            async with asyncio.timeout(10):
                while len(told) < 2:
                    await asyncio.sleep(0.001)
        return told

    assert asyncio.run(body()) == [None, None]


def test_the_folder_of_the_instances_is_its_owners_alone_whatever_the_umask_is(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        loop = asyncio.new_event_loop()
        files = InstanceFiles(tmp_path, loop)
        files.start()
        files.keep(1, b'{"ingest_endpoint": "http://a.example/"}')
        files.close(10)
        loop.close()
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("instances", "instances/1.json")]
    assert modes == [0o700, 0o600]
