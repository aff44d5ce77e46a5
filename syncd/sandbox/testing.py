"""Runs a sandbox for tests: a real server on a real socket, in a thread of this process."""

import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from syncd.sandbox.server import SandboxServer, listen, url_of
from syncd.sandbox.settings import Settings

START_SECONDS = 10
STOP_SECONDS = 10


@contextmanager
def running_sandbox(
    db: Path | None = None,
    *,
    port: int = 0,
    token: str | None = None,
    subjects: bool = True,
    max_subjects_per_customer: int | None = None,
    dedupe: bool = True,
    flush_seconds: float = 0,
    provision_subjects: bool = True,
) -> Iterator[str]:
    """Serve a sandbox on 127.0.0.1 and yield its base URL, such as http://127.0.0.1:41234.

    Without `db` it starts empty and leaves nothing behind. With the port and the file of an earlier sandbox,
    it looks like the same server after a restart. Requests still running at the end are cancelled after a
    second.
    """
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        settings = Settings(
            db=db or Path(folder) / "sandbox.sqlite3",
            token=token,
            subjects=subjects,
            max_subjects_per_customer=max_subjects_per_customer,
            dedupe=dedupe,
            flush_seconds=flush_seconds,
            provision_subjects=provision_subjects,
        )
        listener = stack.enter_context(listen("127.0.0.1", port))
        url = url_of(listener)
        started = threading.Event()
        server = SandboxServer(settings, started.set, grace_seconds=1)
        thread = threading.Thread(target=server.run, args=([listener],), name="sandbox", daemon=True)
        thread.start()
        try:
            if not started.wait(START_SECONDS):
                raise RuntimeError("the sandbox did not start")
            yield url
        finally:
            server.should_exit = True
            thread.join(STOP_SECONDS)
