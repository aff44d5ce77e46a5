"""Location of the state, without opening it: this module imports no database library.

A command that only wants to know whether there is any state does not wait for SQLAlchemy, whose import takes
longer than that of the command.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

FILE = "state.sqlite3"
OLD_FILE = "history.sqlite3"
"""The history of versions before there was a schema with revisions; none of them was released."""
SCHEMES = frozenset({"postgresql", "postgres"})


@dataclass(frozen=True, slots=True)
class StateLocation:
    """Where the state is: a PostgreSQL database if there is a `url`, else a SQLite file in a folder."""

    folder: Path
    url: str | None = field(default=None, repr=False)
    """With its password: only `str()` may be shown."""

    @property
    def file(self) -> Path:
        """Return the SQLite file."""
        return self.folder / FILE

    def exists(self) -> bool:
        """Return whether there may be state to read."""
        return self.url is not None or self.file.exists()

    def __str__(self) -> str:
        """Return the location as error messages name it, with the setting and without any secret."""
        if self.url is None:
            return f"{self.file} (daemon.state_dir)"
        parts = urlsplit(self.url)
        user = f"{parts.username}@" if parts.username else ""
        port = f":{parts.port}" if parts.port else ""
        # Without the query, which may hold a password too.
        return f"postgresql://{user}{parts.hostname or ''}{port}{parts.path} (daemon.state_url)"

    def without_secrets(self, text: str) -> str:
        """Return a text of the database or its driver without the password."""
        parts = urlsplit(self.url or "")
        given = [parts.password or "", unquote(parts.password or "")]
        given += [value for name, value in parse_qsl(parts.query) if "password" in name]
        for secret in filter(None, given):
            text = text.replace(secret, "***")
        return text


def check_url(url: str) -> str:
    """Return the URL of a PostgreSQL database; raises ValueError, which quotes nothing of it."""
    try:
        parts = urlsplit(url.strip())
        _ = parts.port
    except ValueError:
        raise ValueError("must be a URL, such as postgresql://syncd@db.example.com/syncd") from None
    if parts.scheme not in SCHEMES or not parts.path.strip("/") or parts.fragment:
        raise ValueError(
            "must be postgresql://[user[:password]@]host[:port]/database; leave it out for a SQLite file in"
            " daemon.state_dir"
        )
    return url.strip()
