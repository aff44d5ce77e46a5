"""The documentation builds as a site, every link and anchor in it leading somewhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from tests.docs_site import TOP_LEVEL, rewritten
from tests.documents import PAGES, ROOT

pytestmark = pytest.mark.slow

needs_mkdocs = pytest.mark.skipif(
    find_spec("mkdocs") is None, reason="MkDocs is not installed: `make docs` installs it"
)


def build(config: Path, site: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--config-file", str(config), "--site-dir", str(site)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=100,
    )


@needs_mkdocs
def test_the_site_builds_without_a_warning_and_has_every_page(tmp_path: Path) -> None:
    built = build(ROOT / "mkdocs.yml", tmp_path / "site")
    assert built.returncode == 0, built.stdout
    assert "WARNING" not in built.stdout, built.stdout
    expected = {TOP_LEVEL.get(page, page.removeprefix("docs/")) for page in PAGES}
    missing = [page for page in expected if not (tmp_path / "site" / page).with_suffix(".html").is_file()]
    assert missing == []
    index = (tmp_path / "site" / "index.html").read_text()
    assert 'src="images/dashboard.png"' in index
    assert 'href="howto/enable-the-plugin.html"' in index


@needs_mkdocs
@pytest.mark.parametrize("link", ["nowhere.md", "plugin.md#no-such-heading", "../no-such-file.yml"])
def test_a_link_that_leads_nowhere_fails_the_build(link: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    with (tmp_path / "docs" / "concepts.md").open("a") as page:
        page.write(f"\n[broken]({link})\n")
    # Inherited, with the folder of the pages elsewhere; the hook is the repository's.
    config = {
        "INHERIT": str(ROOT / "mkdocs.yml"),
        "docs_dir": str(tmp_path / "docs"),
        "hooks": [str(ROOT / "tests" / "docs_site.py")],
    }
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump(config))
    built = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert built.returncode != 0
    assert "concepts.md" in built.stdout
    assert "1 warnings in strict mode" in built.stdout


@pytest.mark.parametrize(
    ("page", "link", "in_the_site"),
    [
        ("index.md", "docs/plugin.md#sizing", "plugin.md#sizing"),
        ("index.md", "docs/images/dashboard.png", "images/dashboard.png"),
        ("index.md", "LICENSE", "repository/LICENSE"),
        ("plugin.md", "../README.md#the-demo", "index.md#the-demo"),
        ("howto/first-sync.md", "../../kong.yml", "../repository/kong.yml"),
        ("howto/first-sync.md", "../syncd.md", "../syncd.md"),
        ("howto/first-sync.md", "../../SECURITY.md", "../security-policy.md"),
        ("plugin.md", "#sizing", "#sizing"),
        ("plugin.md", "https://openmeter.io", "https://openmeter.io"),
    ],
)
def test_a_link_is_rewritten_for_its_place_in_the_site(page: str, link: str, in_the_site: str) -> None:
    assert rewritten(f"A [text]({link}).", page) == f"A [text]({in_the_site})."


def test_a_link_to_a_folder_outside_the_documentation_becomes_text() -> None:
    assert rewritten("See [`spool/`](../plugin/openmeter_plugin/spool).", "plugin.md") == "See `spool/`."


def test_a_link_in_a_block_stays() -> None:
    block = "```text\n[text](../kong.yml)\n```"
    assert rewritten(block, "plugin.md") == block
