"""A daemon with its dashboard, and a visitor who uses it like a browser without scripts."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import unescape
from html.parser import HTMLParser

import httpx
import yaml

from syncd.config import settings
from syncd.daemon.service import RunningDaemon, running
from syncd.dashboard.session import IDLE
from syncd.state.database import State
from syncd.usage.refresh import Refresher
from syncd.usage.store import UsageStore
from tests.syncd.processes import Project

TOKEN = "token-of-the-operator"
FORM_TOKEN = re.compile(r'name="form_token" value="([0-9a-f]+)"')


@dataclass
class Visitor:
    """A person with a browser; `client` keeps cookies and does not follow redirects."""

    client: httpx.Client

    def see(self, path: str = "/dashboard/", **query: str) -> str:
        answer = self.client.get(path, params=query or None)
        assert answer.status_code == 200, (
            f"{answer.status_code} {answer.headers.get('location')} {answer.text}"
        )
        return answer.text

    def form_token(self, path: str = "/dashboard/") -> str:
        return form_token(self.see(path))

    def log_in(self, token: str = TOKEN, place: str = "/dashboard/") -> httpx.Response:
        page = self.see("/dashboard/login")
        return self.client.post(
            "/dashboard/login", data={"form_token": form_token(page), "token": token, "next": place}
        )

    def send(self, path: str, page: str = "/dashboard/", **fields: str) -> httpx.Response:
        """Send a form of a page."""
        return self.client.post(path, data={"form_token": self.form_token(page), **fields})

    def preview(self, **fields: str) -> str:
        """Request a dry run with fields of the form, and return its page when it has ended."""
        offered = {field.attributes.get("name") for field in elements(self.see()).of("input", "select")}
        assert set(fields) <= offered, f"not on the form: {set(fields) - offered}"
        return self.finished(self.send("/dashboard/resync", **fields))

    def apply(self, dry_run_page: str, **fields: str) -> str:
        """Confirm the plan of a dry run, and return the page of the real run when it has ended."""
        return self.finished(self.confirm(dry_run_page, **fields))

    def confirm(self, dry_run_page: str, **fields: str) -> httpx.Response:
        found = re.search(r'action="(/dashboard/runs/\w+/apply)"', dry_run_page)
        assert found, f"nothing to confirm: {text_of(dry_run_page)}"
        return self.client.post(found[1], data={"form_token": form_token(dry_run_page), **fields})

    def finished(self, redirect: httpx.Response) -> str:
        assert redirect.status_code == 303, redirect.text
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            page = self.see(redirect.headers["location"])
            if 'http-equiv="refresh"' not in page:
                return page
            time.sleep(0.02)
        raise AssertionError("the run did not end")


def form_token(page: str) -> str:
    found = FORM_TOKEN.search(page)
    assert found, page
    return found[1]


@dataclass
class Site:
    """A running daemon and its address."""

    running: RunningDaemon
    url: str
    project: Project

    @contextmanager
    def visitor(self, **headers: str) -> Iterator[Visitor]:
        with httpx.Client(base_url=self.url, headers=headers, timeout=20) as client:
            yield Visitor(client)

    @contextmanager
    def operator(self) -> Iterator[Visitor]:
        """A visitor who has logged in."""
        with self.visitor() as visitor:
            assert visitor.log_in().status_code == 303
            yield visitor

    def api(self, **headers: str) -> httpx.Client:
        given = {"Authorization": f"Bearer {TOKEN}", **headers}
        return httpx.Client(base_url=self.url, headers=given, timeout=20)


@contextmanager
def site(
    project: Project,
    *,
    token: str | None = TOKEN,
    extra: str = "",
    daemon: str = "",
    session_idle: float = IDLE,
) -> Iterator[Site]:
    """Run a daemon and wait until its first run has ended."""
    wanted = f", token: '{token}'" if token else ""
    project.configure(f"daemon: {{listen: '127.0.0.1:0', state_dir: state{wanted}{daemon}}}\n{extra}")
    with running(settings.load(project.config), session_idle=session_idle) as daemon_running:
        found = Site(daemon_running, daemon_running.address.url, project)
        with found.api() as client:
            deadline = time.monotonic() + 20
            while client.get("/v1/status").json()["last"] is None:
                assert time.monotonic() < deadline, "the first run did not end"
                time.sleep(0.01)
        yield found


def refresh_usage(found: Site) -> None:
    """Bring the kept usage up to date with the metering API, as the daemon does every half hour."""
    config = found.running.config
    with State(config.daemon.state) as state:
        assert Refresher(UsageStore(state), lambda: config).refresh().problem is None


def consumers(project: Project, *names: str, tags: dict[str, str] | None = None) -> None:
    """Write these consumers to Kong's file."""
    tagged = tags or {}
    listed = [
        {"username": name, **({"tags": [f"customer:{tagged[name]}"]} if name in tagged else {})}
        for name in names
    ]
    document = {"_format_version": "3.0", "consumers": listed}
    (project.folder / "kong.yml").write_text(yaml.safe_dump(document, allow_unicode=True))


def text_of(page: str) -> str:
    """The text of a page as one line."""
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", page)).split())


@dataclass
class Element:
    tag: str
    attributes: dict[str, str | None]
    inside: tuple[str, ...]


@dataclass
class Elements(HTMLParser):
    """All elements of a page, each with its enclosing tags."""

    found: list[Element] = field(default_factory=list)
    _open: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append(Element(tag, dict(attrs), tuple(self._open)))
        if tag not in {"meta", "link", "input", "img", "br", "hr"}:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"{tag} ends, and nothing is open"
        assert self._open.pop() == tag, f"{tag} ends in the wrong place"

    def of(self, *tags: str) -> list[Element]:
        return [element for element in self.found if element.tag in tags]


def elements(page: str) -> Elements:
    parser = Elements()
    parser.feed(page)
    parser.close()
    assert parser._open == [], f"not closed: {parser._open}"
    return parser
