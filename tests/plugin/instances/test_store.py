"""Instance files: the next server knows the instances, and no file holds a token."""

from __future__ import annotations

import asyncio
import os
import stat
from pathlib import Path

import orjson
import pytest

from openmeter_plugin.config.instance_config import parse_config, parse_object
from openmeter_plugin.instances.instance import InstanceIds, Instances
from openmeter_plugin.instances.store import InstanceFiles, InstanceFinder, parse_file, without_token
from syncd.sandbox.testing import running_sandbox
from tests.harness.kong import KongWorker, PluginInstance, drive
from tests.harness.process import PluginServer, eventually, plugin_server
from tests.harness.recordings import WIRE
from tests.plugin.spools import running_writer
from tests.plugin.traffic import TOKEN, plugin, request, stored

pytestmark = pytest.mark.slow


def only_file(server: PluginServer) -> Path:
    (path,) = eventually(lambda: list(server.spool.glob("instances/*.json")), what="the file")
    return path


def hand_over(server: PluginServer, instance: PluginInstance, number: int) -> KongWorker:
    async def run() -> KongWorker:
        worker = KongWorker(server.socket)
        recorded, tag = request(number)
        await drive(worker, [(instance, recorded, tag)], concurrency=1)
        await worker.close()
        return worker

    return asyncio.run(run())


def test_the_next_server_knows_the_instances_of_the_previous_one_and_no_file_has_the_token(
    tmp_path: Path,
) -> None:
    with running_sandbox(token=TOKEN) as sandbox:
        instance = plugin(sandbox)
        with plugin_server(tmp_path) as server:
            assert hand_over(server, instance, 0).tally.lost == []
            path = only_file(server)
            assert path.stem == str(instance.instance_id)
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
            assert TOKEN not in path.read_text()
            eventually(lambda: stored(sandbox) == 1, what="the arrival")
        with plugin_server(tmp_path) as server:
            tally = hand_over(server, instance, 1).tally
            assert (tally.lost, tally.resent) == ([], 0)
            eventually(lambda: stored(sandbox) == 2, what="the arrival, with the previous token")


def test_the_file_of_an_instance_that_kong_has_closed_is_removed(tmp_path: Path) -> None:
    with running_sandbox(token=TOKEN) as sandbox, plugin_server(tmp_path) as server:
        instance = plugin(sandbox)
        hand_over(server, instance, 0)
        path = only_file(server)

        async def close() -> None:
            worker = KongWorker(server.socket)
            await worker.close_instance(int(path.stem))
            await worker.close()

        asyncio.run(close())
        eventually(lambda: not path.exists(), what="the removal")


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\xff", b'{"config": {}, "had_token": true}', b"[]"])
def test_an_instance_whose_file_is_invalid_is_started_again_by_kong(
    tmp_path: Path, content: bytes | None
) -> None:
    with running_sandbox(token=TOKEN) as sandbox:
        instance = plugin(sandbox)
        with plugin_server(tmp_path) as server:
            hand_over(server, instance, 0)
            path = only_file(server)
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        with plugin_server(tmp_path) as server:
            tally = hand_over(server, instance, 1).tally
            assert (tally.lost, tally.resent) == ([], 1)


def test_the_saved_part_of_a_configuration_makes_the_same_rules() -> None:
    recorded = orjson.loads((WIRE / "start-instance-full-schema.json").read_bytes())
    for config in (
        recorded,
        {"ingest_endpoint": "http://a.example/", "$refs": {"api_token": "{vault://e/t}"}},
    ):
        raw = orjson.dumps(config | {"ingest_endpoint": "http://a.example/", "api_token": TOKEN})
        saved = without_token(raw)
        assert saved is not None
        parsed = parse_file(saved)
        assert parsed is not None
        assert parsed[1]
        assert parse_config(parse_object(parsed[0]))[1] == parse_config(parse_object(raw))[1]
        assert TOKEN.encode() not in saved


CONFIG = orjson.dumps(
    {
        "ingest_endpoint": "http://a.example/",
        "subject": {"missing": "fallback", "fallback_subject": "acme"},
        "api_token": TOKEN,
    }
)


def test_any_flipped_bit_in_a_file_is_noticed() -> None:
    saved = without_token(CONFIG)
    assert saved is not None
    assert parse_file(saved) is not None
    for position in range(8 * len(saved)):
        damaged = bytearray(saved)
        damaged[position // 8] ^= 1 << position % 8
        found = parse_file(bytes(damaged))
        assert found is None or found == parse_file(saved), bytes(damaged)


def test_an_instance_whose_file_is_damaged_bills_nobody_else(tmp_path: Path) -> None:
    with running_sandbox(token=TOKEN) as sandbox:
        instance = plugin(sandbox)
        instance.config["subject"] = {"missing": "fallback", "fallback_subject": "acme"}
        with plugin_server(tmp_path) as server:
            hand_over(server, instance, 0)
            path = only_file(server)
        content = path.read_bytes()
        assert content.count(b'"acme"') == 1
        path.write_bytes(content.replace(b'"acme"', b'"acma"'))
        with plugin_server(tmp_path) as server:
            tally = hand_over(server, instance, 1).tally
            assert (tally.lost, tally.resent) == ([], 1)


def test_a_file_without_a_checksum_is_read_as_earlier_servers_wrote_it() -> None:
    saved = without_token(CONFIG)
    assert saved is not None
    content = orjson.loads(saved)
    del content["crc32"]
    assert parse_file(orjson.dumps(content)) == parse_file(saved)


def test_an_invalid_configuration_is_not_saved() -> None:
    assert without_token(b'{"ingest_endpoint": 7, "secret": "s"}') is None
    assert without_token(b"no JSON") is None


def test_files_that_no_server_has_touched_for_long_are_removed_and_those_in_use_are_not(
    tmp_path: Path,
) -> None:
    async def body() -> None:
        files = InstanceFiles(tmp_path, asyncio.get_running_loop())
        files.start()
        for number in (1, 2, 3):
            files.save(number, b'{"ingest_endpoint": "http://a.example/"}')
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


def test_the_file_says_whether_there_was_a_token_and_holds_no_placeholder_for_it() -> None:
    reference = {"$refs": {"api_token": "{vault://e/t}"}}
    for config, had_token in (
        ({}, False),
        ({"api_token": TOKEN}, True),
        ({"api_token": ""} | reference, True),
    ):
        saved = without_token(orjson.dumps({"ingest_endpoint": "http://a.example/"} | config))
        assert saved is not None
        parsed = parse_file(saved)
        assert parsed is not None
        assert parsed[1] is had_token
        assert "api_token" not in orjson.loads(parsed[0])


def test_an_instance_whose_file_cannot_be_read_in_time_is_started_again_by_kong(tmp_path: Path) -> None:
    async def body() -> list[object]:
        loop = asyncio.get_running_loop()
        files = InstanceFiles(tmp_path, loop)  # its thread is not started, as if it hung
        found: list[object] = []
        with running_writer(tmp_path) as writer:
            instances = Instances(InstanceIds(tmp_path), writer)
            finder = InstanceFinder(files, instances, loop, timeout=0.02)
            finder.find(7, found.append)
            finder.find(7, found.append)
            async with asyncio.timeout(10):
                while len(found) < 2:
                    await asyncio.sleep(0.001)
        return found

    assert asyncio.run(body()) == [None, None]


def test_instance_files_are_private_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        loop = asyncio.new_event_loop()
        files = InstanceFiles(tmp_path, loop)
        files.start()
        files.save(1, b'{"ingest_endpoint": "http://a.example/"}')
        files.close(10)
        loop.close()
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("instances", "instances/1.json")]
    assert modes == [0o700, 0o600]
