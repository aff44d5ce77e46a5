"""Helpers for tests of `openmeter-plugin spool`: run its commands as an operator does."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import subprocess
import sys
from contextlib import closing
from typing import Any

import orjson
import pytest

from openmeter_plugin.cli import main
from openmeter_plugin.spool.segment import QUARANTINED, encode_record

TOKEN = "token-of-the-spool-commands"
OLD, NEW = "2026-11-20T05:49:03.779Z", "2026-11-22T07:00:00.000Z"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command in this process: a new process takes ten times as long."""
    out, err = (io.TextIOWrapper(io.BytesIO(), write_through=True) for _ in range(2))
    status: int | str | None = 0
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "argv", ["openmeter-plugin", "spool", *arguments])
        try:
            main.run()
        except SystemExit as end:
            status = end.code
    assert isinstance(status, int)
    texts = [stream.buffer.getvalue().decode() for stream in (out, err)]
    return subprocess.CompletedProcess(arguments, status, *texts)


def run_process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "openmeter_plugin", "spool", *arguments],
        capture_output=True,
        text=True,
        timeout=30,
        env=os.environ | environment,
    )


def printed(*arguments: str, status: int = 0) -> Any:
    result = run(*arguments, "--output=json")
    assert result.returncode == status, result.stderr
    return json.loads(result.stdout)


def on_a_terminal(*arguments: str) -> str:
    """Run a command on a terminal and return its screen."""
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "openmeter_plugin", "spool", *arguments]
    with closing(os.fdopen(master, "rb", buffering=0)) as screen:
        environment = os.environ | {"COLUMNS": "140", "TERM": "dumb"}
        process = subprocess.Popen(command, stdout=slave, stderr=slave, env=environment)
        os.close(slave)
        seen = b""
        try:
            while more := screen.read(65536):
                seen += more
        except OSError:  # reading a closed terminal raises
            pass
        assert process.wait(20) == 0, seen.decode()
    return seen.decode()


def quarantine_record(number: int) -> bytes:
    log = {"request": {"id": f"quarantined-{number}"}, "started_at": 1}
    return encode_record(QUARANTINED + orjson.dumps({"reason": "no_consumer", "log": log}))
