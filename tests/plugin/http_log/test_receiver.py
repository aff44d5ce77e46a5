"""The answers to http-log's posts, and their records in the spool."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import orjson
import pytest

from openmeter_plugin.http_log.config import load
from tests.plugin.http_log_posts import (
    ALICE,
    HEADERS,
    SECRET,
    batch,
    configuration,
    log_of,
    receiving,
    recorded_logs,
    run,
)

pytestmark = pytest.mark.slow


async def bytes_answered(port: int, request: bytes) -> bytes:
    """Send bytes and return everything that comes back until the connection is closed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    try:
        return await asyncio.wait_for(reader.read(), 10)
    except ConnectionResetError:
        return b""
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


def test_a_single_log_without_an_array_is_accepted_as_with_a_batch_size_of_one(tmp_path: Path) -> None:
    async def test() -> None:
        async with receiving(tmp_path) as receiver:
            answer = await receiver.post(log_of("one"), content_type="application/json; charset=utf-8")
            assert (answer.status_code, answer.json()) == (200, {"requests": 1, "bad_records": 0})
            assert receiver.ids() == ["one"]

    run(test())


def test_a_post_gets_its_200_only_when_all_of_it_is_on_disk(tmp_path: Path) -> None:
    async def test() -> None:
        async with receiving(tmp_path) as receiver:
            for number in range(20):
                ids = [f"{number}-{n}" for n in range(50)]
                assert (await receiver.post(batch(*ids))).status_code == 200
                assert receiver.ids()[-50:] == ids

    run(test())


def test_every_method_of_http_log_is_served_at_any_path(tmp_path: Path) -> None:
    async def test() -> None:
        async with receiving(tmp_path) as receiver:
            for method in ("POST", "PUT", "PATCH"):
                answer = await receiver.client.request(method, "/a/b", content=batch("x"), headers=HEADERS)
                assert answer.status_code == 200
            assert (await receiver.client.get("/a/b", headers=HEADERS)).status_code == 405

    run(test())


def test_nothing_is_accepted_without_the_secret(tmp_path: Path) -> None:
    async def test() -> None:
        async with receiving(tmp_path) as receiver:
            for wrong in ("", SECRET[:-1], SECRET + "x"):
                answer = await receiver.post(batch("x"), x_metering_key=wrong)
                assert answer.status_code == 401
                assert "x-metering-key" in answer.json()["message"]
            without = {"content-type": "application/json"}
            assert (await receiver.client.post("/", content=b"[]", headers=without)).status_code == 401
            twice = [*HEADERS.items(), ("x-metering-key", SECRET)]
            assert (await receiver.client.post("/", content=b"[]", headers=twice)).status_code == 401
            assert receiver.records() == []

    run(test())


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *((host, 200) for host in ("localhost", "LOCALHOST:8095", "127.0.0.1", "127.0.0.1:1", "[::1]:8095")),
        *((host, 421) for host in ("evil.example", "evil.example:8095", "127.0.0.1.evil.example", "")),
    ],
)
def test_without_a_secret_a_loopback_receiver_answers_only_to_its_own_names(
    tmp_path: Path, host: str, status: int
) -> None:
    async def test() -> None:
        async with receiving(tmp_path, secret="") as receiver:
            assert (await receiver.post(batch("x"), host=host)).status_code == status
            assert len(receiver.records()) == (status == 200)

    run(test())


def test_with_a_secret_any_name_of_the_receiver_will_do(tmp_path: Path) -> None:
    async def test() -> None:
        async with receiving(tmp_path) as receiver:
            assert (await receiver.post(batch("x"), host="metering.internal")).status_code == 200

    run(test())


@pytest.mark.parametrize("secret", ["", SECRET])
@pytest.mark.parametrize("header", ["origin", "sec-fetch-site", "sec-fetch-mode", "sec-fetch-dest"])
def test_what_a_web_page_sends_is_refused(tmp_path: Path, header: str, secret: str) -> None:
    async def test() -> None:
        async with receiving(tmp_path, secret=secret) as receiver:
            assert (await receiver.post(batch("x"), **{header: "null"})).status_code == 403
            assert receiver.records() == []

    run(test())


def test_several_secrets_are_valid_at_a_time_so_that_one_can_be_replaced(tmp_path: Path) -> None:
    both = f"[{SECRET}, the-secret-of-tomorrow]"
    (tmp_path / "c.yaml").write_text(configuration(secret=both))
    secrets = load(tmp_path / "c.yaml", {}).settings.secret
    assert [secret.get_secret_value() for secret in secrets] == [SECRET, "the-secret-of-tomorrow"]

    async def test() -> None:
        async with receiving(tmp_path, http_log="  header: X-Other-Key", secret=both) as receiver:
            for secret in (SECRET, "the-secret-of-tomorrow"):
                assert (await receiver.post(batch(secret), x_other_key=secret)).status_code == 200
            assert (await receiver.post(batch("x"), x_other_key="the-secret-of-yesterday")).status_code == 401

    run(test())


def test_a_body_that_is_not_json_is_400_with_the_reason(tmp_path: Path) -> None:
    async def test() -> None:
        async with receiving(tmp_path) as receiver:
            for body in (b"", b"nonsense", b"17", b'"text"', b"[", b'[{"a":1}', b'{"a":1', b"[]]"):
                answer = await receiver.post(body)
                assert answer.status_code == 400, body
                assert answer.json()["message"].startswith("the body is not what http-log posts: ")
            assert receiver.records() == []

    run(test())


def test_another_content_type_and_a_compressed_body_are_415(tmp_path: Path) -> None:
    async def test() -> None:
        async with receiving(tmp_path) as receiver:
            assert (await receiver.post(batch("x"), content_type="text/plain")).status_code == 415
            assert (await receiver.post(batch("x"), content_encoding="gzip")).status_code == 415

    run(test())


def test_a_bad_entry_is_counted_and_its_good_neighbours_are_accepted(tmp_path: Path) -> None:
    too_deep = b'{"a":' * 20_000 + b"1" + b"}" * 20_000  # 3.13 takes 10,000 levels, 3.11 and 3.12 fewer
    bad = [b"null", b"17", b"[]", b'"text"', b"nonsense", b'{"a":oops}', too_deep]

    async def test() -> None:
        async with receiving(tmp_path) as receiver:
            for entry in bad:
                answer = await receiver.post(b"[" + b",".join([log_of("a"), entry, log_of("b")]) + b"]")
                assert (answer.status_code, answer.json()) == (200, {"requests": 3, "bad_records": 1}), entry
            assert receiver.ids() == ["a", "b"] * len(bad)
            assert [r.body for r in receiver.records() if r.kind == b"S"] == [b"bad_record"] * len(bad)

    run(test())


def test_a_header_with_invalid_utf_8_loses_no_event(tmp_path: Path) -> None:
    async def test() -> None:
        async with receiving(tmp_path) as receiver:
            body = batch("a", "b", "c").replace(b"curl/7.88.1", b"caf\xe9 \xff},{", 2)
            assert b"\xff},{" in body
            assert (await receiver.post(body)).status_code == 200
            assert receiver.ids() == ["a", "b", "c"]

    run(test())


def test_a_log_without_a_request_id_gets_the_same_id_when_its_batch_is_posted_again(tmp_path: Path) -> None:
    async def test() -> None:
        log = recorded_logs()[0]
        del log["request"]["id"]
        async with receiving(tmp_path) as receiver:
            for _ in range(2):
                assert (await receiver.post(json.dumps([log, log]).encode())).status_code == 200
            first, second, *again = receiver.ids()
            assert again == [first, second]
            assert first != second

    run(test())


def test_the_application_is_used_where_the_plugin_would_have_queried_it(tmp_path: Path) -> None:
    async def test() -> None:
        always = "application_context: always"
        async with receiving(tmp_path, plugin=always) as receiver:
            log = recorded_logs()[0] | {"application_context": {"application_id": "an-app"}}
            assert (await receiver.post(json.dumps(log).encode())).status_code == 200
            (event,) = orjson.loads(b"[" + receiver.records()[0].events + b"]")
            assert (event["subject"], event["data"]["application_id"]) == (ALICE, "an-app")

    run(test())


def test_a_path_capture_is_read_from_the_log(tmp_path: Path) -> None:
    async def test() -> None:
        attribute = "{source: path_capture, look_up_value_in: tenant, event_property_name: tenant}"
        async with receiving(tmp_path, plugin=f"attributes: [{attribute}]") as receiver:
            log = recorded_logs()[0] | {"uri_captures": {"named": {"tenant": "t-1"}}}
            assert (await receiver.post(json.dumps(log).encode())).status_code == 200
            (event,) = orjson.loads(b"[" + receiver.records()[0].events + b"]")
            assert event["data"]["tenant"] == "t-1"

    run(test())


def test_a_body_over_the_limit_is_413_with_or_without_a_content_length(tmp_path: Path) -> None:
    async def test() -> None:
        async def pieces() -> AsyncIterator[bytes]:
            for _ in range(9):
                yield b" " * 16 * 1024

        async with receiving(tmp_path, http_log="  max_body: 64KiB") as receiver:
            for body in (b" " * 150_000, pieces()):
                answer = await receiver.post(body)
                assert answer.status_code == 413
                assert "64.0KiB" in answer.json()["message"]
            assert (await receiver.post(batch("fits"))).status_code == 200

    run(test())


def test_a_body_of_exactly_the_limit_is_accepted(tmp_path: Path) -> None:
    async def test() -> None:
        async with receiving(tmp_path, http_log="  max_body: 64KiB") as receiver:
            answer = await receiver.post(batch("fits").ljust(64 * 1024))
            assert (answer.status_code, receiver.ids()) == (200, ["fits"])

    run(test())


def test_a_head_that_does_not_end_closes_the_connection(tmp_path: Path) -> None:
    async def test() -> None:
        async with receiving(tmp_path, http_log="  read_timeout: 0.2") as receiver:
            for head in (b"", b"POST / HTTP/1.1\r\nHost: x\r\n", b"POST / HTTP/1.1\r\nx: " + b"y" * 100_000):
                assert (await bytes_answered(receiver.port, head))[:12] in (b"", b"HTTP/1.1 400")

    run(test())


def test_a_body_that_does_not_end_is_408_and_none_of_it_is_spooled(tmp_path: Path) -> None:
    async def test() -> None:
        async with receiving(tmp_path, http_log="  read_timeout: 0.2") as receiver:
            head = f"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\nx-metering-key: {SECRET}\r\n"
            request = head.encode() + b"Content-Type: application/json\r\n\r\n" + batch("a", "b")
            assert (await bytes_answered(receiver.port, request)).startswith(b"HTTP/1.1 408")
            assert receiver.records() == []

    run(test())
