"""The gate with many active subjects: staleness, calls a second, memory and CPU.

    python -m tests.bench.gate [--subjects 10000] [--features 3] [--seconds 30] [--latency 0.02]
        [--settle 100]

The metering API is a small server of its own process, which answers access queries and balances after a
latency; every subject is metered and uses its allowance up slowly. Kong's reports and the feed go over the
real socket.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import httpx

_READY: Final = 30.0
_CLOCK_TICKS: Final = os.sysconf("SC_CLK_TCK")


class Api(asyncio.Protocol):
    """One connection of the metering API; HTTP/1.1 with a content-length, which is what httpx sends."""

    features: Final[list[str]] = []
    latency = 0.02
    calls = 0
    refused = 0
    started = time.time()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.data = b""

    def data_received(self, data: bytes) -> None:
        self.data += data
        while b"\r\n\r\n" in self.data:
            head, _, rest = self.data.partition(b"\r\n\r\n")
            length = 0
            for field in head.split(b"\r\n")[1:]:
                if field.lower().startswith(b"content-length:"):
                    length = int(field.partition(b":")[2])
            if len(rest) < length:
                return
            body, self.data = rest[:length], rest[length:]
            loop = asyncio.get_running_loop()
            loop.call_later(self.latency, self.answer, head.split(b" ", 2)[1].decode(), body)

    def answer(self, path: str, body: bytes) -> None:
        if path != "/calls":
            Api.calls += 1
        if self.transport.is_closing():
            return
        content = json.dumps(self.document(path, body)).encode()
        head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
        self.transport.write(head.encode() + content)  # type: ignore[attr-defined]

    def document(self, path: str, body: bytes) -> dict[str, Any]:
        if path == "/calls":
            return {"calls": Api.calls}
        if "entitlement-access/query" in path:
            keys = json.loads(body)["customer"]["keys"]
            access = {key: {"has_access": True} for key in self.features}
            data = [{"customer": {"id": f"c-{k}"}, "matched": [k], "features": access} for k in keys]
            return {"data": data, "errors": [], "meta": {}}
        left = max(0.0, 1_000_000 - 100 * (time.time() - self.started))
        value = {"hasAccess": True, "balance": left, "totalAvailableGrantAmount": 1_000_000}
        return {"entitlements": dict.fromkeys(self.features, value)}


async def _serve_api(features: int, latency: float) -> None:
    Api.features.extend(f"f{number}" for number in range(features))
    Api.latency = latency
    server = await asyncio.get_running_loop().create_server(Api, "127.0.0.1", 0)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await server.serve_forever()


def _gate(settings: Path, spool: Path) -> None:
    """Run the gate alone, as the supervisor's child does."""
    from openmeter_plugin.gate.process import run_gate
    from openmeter_plugin.gate.settings import load
    from openmeter_plugin.log import configure_logging
    from openmeter_plugin.process.sockets import UnixListener

    configure_logging("gate")
    loaded = load(settings)
    run_gate(UnixListener(loaded.socket, 0o600).socket, loaded, spool, asyncio.sleep(10**6))


def _process(pid: int) -> tuple[float, float]:
    """Return the resident memory of a process in MiB and the CPU seconds it has used."""
    status = Path(f"/proc/{pid}/status").read_text()
    resident = int(status.split("VmRSS:")[1].split()[0]) / 1024
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return resident, (int(fields[11]) + int(fields[12])) / _CLOCK_TICKS


def _report(client: httpx.Client, subjects: range) -> None:
    for start in range(subjects.start, subjects.stop, 2_000):
        part = subjects[start - subjects.start : start - subjects.start + 2_000]
        lines = [f"S\tsubject-{number}" for number in part]
        text = "\n".join(["openmeter-report\t1", *lines, f"end\t{len(lines)}"]) + "\n"
        client.post("/v1/report", params={"kong": "bench"}, content=text.encode()).raise_for_status()


def _measure(client: httpx.Client, api: httpx.Client, pid: int, options: argparse.Namespace) -> None:
    subjects = range(options.subjects)
    began = time.monotonic()
    _report(client, subjects)
    while (view := client.get("/v1/gate").json())["keys"] < options.subjects * options.features:
        time.sleep(0.2)
    print(f"all subjects known after {time.monotonic() - began:.1f} s")
    # Each account's first balance takes a call, too.
    settle = options.subjects / options.max_calls * 2 if options.settle is None else options.settle
    ready = time.monotonic() + settle
    while time.monotonic() < ready:
        _report(client, subjects)
        time.sleep(5)
    calls, (_, cpu), at = api.get("/calls").json()["calls"], _process(pid), time.monotonic()
    ages: list[float] = []
    lines, since = 0, "0.0"
    while time.monotonic() - at < options.seconds:
        _report(client, subjects)
        for _ in range(3):
            answer = client.get("/v1/feed", params={"kong": "bench", "since": since, "wait": "1"})
            head, *rest = answer.text.split("\n")
            since = ".".join(head.split("\t")[2:4])
            lines += len(rest)
        view = client.get("/v1/gate").json()
        ages.append(view["figures"]["state_age"])
    elapsed = time.monotonic() - at
    resident, used = _process(pid)
    rate = (api.get("/calls").json()["calls"] - calls) / elapsed
    ages.sort()
    print(f"{options.subjects} subjects x {options.features} features, {elapsed:.0f} s")
    print(f"oldest reading: median {ages[len(ages) // 2]:.2f} s, worst {ages[-1]:.2f} s")
    print(f"calls: {rate:.0f}/s; memory: {resident:.0f} MiB; CPU: {(used - cpu) / elapsed:.2f} of a core")
    print(f"oldest readings: {[round(age, 1) for age in ages]}; {view['figures']['calls']}")
    print(f"feed: {lines / elapsed:.0f} lines/s; errors: {view['figures']['errors']}")


def main() -> None:
    """Run the measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--subjects", type=int, default=10_000)
    parser.add_argument("--features", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--latency", type=float, default=0.02)
    parser.add_argument("--max-calls", type=float, default=200.0)
    parser.add_argument("--settle", type=float, help="seconds before the measurement")
    parser.add_argument("--api", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--gate", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.api:
        asyncio.run(_serve_api(options.features, options.latency))
    elif options.gate:
        _gate(*options.gate)
    else:
        with tempfile.TemporaryDirectory() as folder:
            _run(Path(folder), options)


def _run(folder: Path, options: argparse.Namespace) -> None:
    command = [sys.executable, "-m", "tests.bench.gate"]
    shape = ["--features", str(options.features), "--latency", str(options.latency)]
    api = subprocess.Popen([*command, "--api", *shape], stdout=subprocess.PIPE, text=True)
    assert api.stdout is not None
    url = f"http://127.0.0.1:{api.stdout.readline().strip()}"
    spool = folder / "spool"
    spool.mkdir()
    socket = folder / "gate.sock"
    settings = {
        "metering": {"url": url},
        "features": [{"key": f"f{number}"} for number in range(options.features)],
        "socket": str(socket),
        "max_calls": options.max_calls,
    }
    (folder / "gate.json").write_text(json.dumps(settings))
    gate = subprocess.Popen([*command, "--gate", str(folder / "gate.json"), str(spool)])
    try:
        deadline = time.monotonic() + _READY
        while not socket.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        transport = httpx.HTTPTransport(uds=str(socket))
        client = httpx.Client(transport=transport, base_url="http://gate", timeout=60)
        with client, httpx.Client(base_url=url) as counter:
            _measure(client, counter, gate.pid, options)
    finally:
        for process in (gate, api):
            process.terminate()
            process.wait()


if __name__ == "__main__":
    main()
