"""Names and answers from outside stay text, and every page is valid HTML."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from urllib.parse import quote

import httpx
import pytest

from syncd.sandbox.testing import running_sandbox
from tests.syncd.dashboard.gateways import FakeGateway, configured, dead_letter, gateway, quarantined
from tests.syncd.dashboard.support import Site, elements, site
from tests.syncd.processes import Project
from tests.syncd.sandbox.support import event, send
from tests.syncd.targets import by_hand

SCRIPT = "<script>document.title='owned'</script>"
EVERY_PAGE = (
    "/",
    "/login",
    "/runs",
    "/customers",
    f"/customers/{quote(f'key-{SCRIPT}', safe='')}",
    "/unbilled",
    "/gateways",
    "/gate",
    "/dead-letters",
    "/dead-letters/eu-1",
    "/dead-letters/eu-1/1",
    "/quarantine",
    "/quarantine/eu-1?reason=no_consumer",
    "/nowhere",
)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A site where every name and answer is a script, and one contains a bidi override."""
    names = (SCRIPT, '"><img src=x onerror=alert(1)>', "abc\u202egnp.exe", "{{ 7 * 7 }}", "a\u0000b")
    letter = dead_letter(1, SCRIPT, subject=SCRIPT, event_id=SCRIPT, type=SCRIPT)
    kept = [quarantined(1, consumer={"username": SCRIPT}, route={"name": "\u202eroute"})]
    kept.append(quarantined(2, SCRIPT))
    fake = FakeGateway(dead=[letter], event={"data": {SCRIPT: "\u202e"}}, kept=kept)
    with running_sandbox() as url, httpx.Client(base_url=url, timeout=20) as sandbox, gateway(fake) as there:
        project = Project(tmp_path_factory.mktemp("hostile"), url)
        by_hand(sandbox, name=SCRIPT, key=f"key-{SCRIPT}")
        document = {"_format_version": "3.0", "consumers": [{"username": name} for name in names]}
        (project.folder / "kong.yml").write_text(json.dumps(document))
        send(sandbox, event("1", subject=SCRIPT), event("2", subject="\u202eevil"))
        with site(project, extra=configured(**{"eu-1": there.url})) as found:
            yield found


def test_scripts_and_bidi_characters_from_outside_stay_text_on_every_page(hostile: Site) -> None:
    with hostile.operator() as visitor:
        run = re.findall(r'href="/dashboard/runs/(\w+)"', visitor.see("/dashboard/runs"))[0]
        paths = [f"/dashboard{path}" for path in EVERY_PAGE if path not in ("/login", "/nowhere")]
        seen = [visitor.see(path) for path in (*paths, f"/dashboard/runs/{run}")]
        seen.append(visitor.see("/dashboard/customers", q=f'"{SCRIPT}'))
        seen.append(visitor.see("/dashboard/customers", q="\u202e"))
    everything = "".join(seen)
    assert "&lt;script&gt;" in everything
    assert "⟨U+202E⟩" in everything
    assert "{{ 7 * 7 }}" in everything
    for page in seen:
        assert "<script" not in page
        assert "<img src=x" not in page
        assert "\u202e" not in page
        assert "\x00" not in page


@pytest.mark.parametrize("path", EVERY_PAGE)
def test_every_page_is_valid(hostile: Site, path: str) -> None:
    """Closed elements, headings, labels, scopes, and nothing that the policy forbids."""
    with hostile.visitor() if path == "/login" else hostile.operator() as visitor:
        answer = visitor.client.get(f"/dashboard{path}")
    page = elements(answer.text)
    assert page.of("html")[0].attributes["lang"] == "en"
    assert len(page.of("h1")) == 1
    assert len(page.of("title")) == 1
    assert len(page.of("main")) == 1
    assert page.of("script", "style", "iframe", "object", "base") == []
    for element in page.found:
        assert "style" not in element.attributes
        assert [name for name in element.attributes if name.startswith("on")] == []
        for name in ("src", "href", "action"):
            target = element.attributes.get(name)
            assert target is None or target.startswith(("/dashboard/", "#")), element
    labelled = {element.attributes.get("for") for element in page.of("label")}
    for element in page.of("input", "select"):
        named = element.attributes.get("id") in labelled or "label" in element.inside
        assert named or element.attributes.get("type") == "hidden", element
    for element in page.of("th"):
        assert element.attributes.get("scope") in ("row", "col"), element
    for element in page.of("form"):
        assert element.attributes["method"] in ("get", "post")
    identities = [element.attributes["id"] for element in page.found if "id" in element.attributes]
    assert len(identities) == len(set(identities))


def test_each_form_that_does_something_carries_its_token(hostile: Site) -> None:
    with hostile.operator() as visitor:
        page = elements(visitor.see())
    forms = [element for element in page.of("form") if element.attributes["method"] == "post"]
    hidden = [e for e in page.of("input") if e.attributes.get("name") == "form_token"]
    assert len(forms) == len(hidden) == 2
