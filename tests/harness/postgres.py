"""A real PostgreSQL, in a temporary folder and on a free port, with a database for each test."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import psycopg

from tests.harness.ports import free_port
from tests.harness.process import eventually

USER = "syncd"
PASSWORD = "pass word/of:the@database"
_INITDB = ("-E", "UTF8", "--locale", "C", "--no-sync")
_QUOTED = "pass%20word%2Fof%3Athe%40database"


def programs() -> Path | None:
    """Return the folder of initdb and postgres; Debian does not put it on the PATH."""
    if found := shutil.which("postgres"):
        return Path(found).parent
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return folders[-1] if folders else None


@dataclass
class Postgres:
    """A running server."""

    process: subprocess.Popen[bytes]
    port: int
    _numbers: Iterator[int] = field(default_factory=count)

    def url(self, database: str = "postgres") -> str:
        """Return the URL of a database, with the password."""
        return f"postgresql://{USER}:{_QUOTED}@127.0.0.1:{self.port}/{database}"

    def new_database(self) -> str:
        """Create an empty database; return its URL."""
        name = f"syncd_{next(self._numbers)}"
        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return self.url(name)

    def is_up(self) -> bool:
        """Return whether it accepts connections."""
        try:
            psycopg.connect(self.url(), connect_timeout=1).close()
        except psycopg.OperationalError:
            return False
        return True


@contextmanager
def running_postgres(bin_folder: Path, *, auth: str = "scram-sha-256") -> Iterator[Postgres]:
    """Run a server; its data are not synced to the disk. `auth` is initdb's."""
    with tempfile.TemporaryDirectory(prefix="syncd-postgres-") as folder:
        as_user = "postgres" if os.geteuid() == 0 else None  # it refuses to run as root
        if as_user:
            shutil.chown(folder, as_user)
        password = Path(folder) / "password"
        password.write_text(PASSWORD)
        password.chmod(0o644)
        data, port = f"{folder}/data", free_port()
        made = subprocess.run(
            [bin_folder / "initdb", *_INITDB, "-A", auth, "-U", USER, "-D", data, "--pwfile", str(password)],
            user=as_user,
            cwd=folder,
            capture_output=True,
            text=True,
        )
        assert made.returncode == 0, made.stderr
        settings = {"fsync": "off", "unix_socket_directories": folder, "listen_addresses": "127.0.0.1"}
        chosen = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        with (
            Path(folder, "log").open("wb") as log,
            subprocess.Popen(
                [bin_folder / "postgres", "-D", data, "-p", str(port), *chosen],
                user=as_user,
                cwd=folder,
                stdout=log,
                stderr=log,
            ) as process,
        ):
            try:
                server = Postgres(process, port)
                eventually(server.is_up, seconds=60, what=f"PostgreSQL on port {port}")
                yield server
            finally:
                process.send_signal(signal.SIGQUIT)
                process.wait(30)
