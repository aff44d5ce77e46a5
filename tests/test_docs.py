"""Every command of the documentation is run, in order, in a clone; those that cannot be are checked.

What is real in a clone, and what is shared with the environment that runs the tests, stands in tests.clones;
what is typed on hosts is run by test_docs_hosts.py; names in what needs Docker or Kubernetes are checked by
test_docs_deploy.py.
"""

from __future__ import annotations

import csv
import json
import re
import shlex
import subprocess
from collections import Counter
from typing import Any

import promql_parser
import pytest
import yaml

from openmeter_plugin.config.schema import FIELDS
from openmeter_plugin.gate.settings import Settings
from syncd.config.settings import Config
from tests.clones import Clone
from tests.documents import PAGES, ROOT, Block, anchors, blocks, commands, links, prose

pytestmark = pytest.mark.slow

RUN = [page for page in PAGES if page != "README.md" and commands(page)]
ALL = [block for page in PAGES for block in blocks(page)]
SHELL = [block for block in ALL if block.kind in {"sh", "console"}]

NOT_RUN = {
    ("docs/deployment.md", "needs Kubernetes"): 1,
    ("docs/deployment.md", "needs root and systemd"): 1,
    ("docs/quickstart-compose.md", "needs Docker"): 2,
    ("docs/quickstart-helm.md", "needs Kubernetes"): 1,
    ("docs/quickstart-systemd.md", "needs root and systemd"): 4,
    ("CONTRIBUTING.md", "takes minutes"): 1,
    ("docs/decisions/connection-handoff.md", "takes minutes"): 1,
    ("docs/decisions/protobuf-codec.md", "takes minutes"): 1,
    ("docs/gate.md", "needs a Konnect account"): 1,
    ("docs/gate.md", "needs a cluster"): 1,
    ("docs/guarantees.md", "takes minutes"): 1,
    ("docs/howto/month-end.md", "needs a month of traffic"): 3,
    ("docs/lua-plugin.md", "needs root"): 1,
    ("docs/notifications.md", "sends messages"): 1,
    ("docs/plugin-settings.md", "needs Konnect"): 1,
    ("docs/quickstart.md", "takes minutes"): 1,
    ("docs/quickstart.md", "the README's test runs it"): 1,
}
"""All blocks that are not run, by page and reason; those with systemd are, around a stand-in for it."""


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    return Clone.make(tmp_path_factory.mktemp("docs") / "kong-openmeter")


@pytest.mark.timeout(180)
@pytest.mark.parametrize("page", RUN)
def test_every_command_of_a_page_ends_as_the_page_says(page: str, clone: Clone) -> None:
    output = clone.run(commands(page))
    assert [block.text for block in blocks(page) if block.printed and block.text not in output] == [], output


def test_a_trial_keeps_its_state_below_the_working_folder_and_removes_it() -> None:
    """Otherwise root's trial writes history and lock of the real daemon, in /var/lib/syncd."""
    writing = re.compile(r"\bsyncd (?:apply|run)\b")
    for page in PAGES:
        lines = commands(page)
        first = next((number for number, line in enumerate(lines) if writing.search(line)), None)
        if first is None:
            continue
        found = re.search(r'STATE_DIRECTORY="\$PWD/(\S+)"', "\n".join(lines[: first + 1]))
        assert found, page
        assert any(line.startswith("rm -r") and found[1] in line.split() for line in lines[first:]), page


def test_the_pages_for_a_beginning_are_among_those_that_are_run() -> None:
    howtos = ("adopt-customers", "first-sync", "group-consumers-by-tag")
    assert {"docs/quickstart.md", *(f"docs/howto/{name}.md" for name in howtos)} <= set(RUN)


def test_no_block_is_left_out_but_those_that_need_what_is_not_here() -> None:
    assert Counter((block.page, block.reason) for block in ALL if block.reason) == NOT_RUN


def test_a_block_that_is_said_to_be_run_by_the_readme_is_there() -> None:
    for block in ALL:
        if block.reason == "the README's test runs it":
            assert set(block.lines) <= set(commands("README.md"))


def scripts() -> list[str]:
    """Return what stands in the shell blocks, of consoles the lines that are typed."""
    return [
        block.text if block.kind == "sh" else "".join(re.findall(r"^\$ (.*\n)", block.text, re.MULTILINE))
        for block in SHELL
    ]


@pytest.mark.parametrize("script", scripts())
def test_what_is_typed_is_shell(script: str) -> None:
    checked = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr


@pytest.fixture(scope="module")
def helped() -> dict[tuple[str, ...], set[str]]:
    """The options of each command of ours, by program and command; a group of commands has "..." besides."""
    import typer

    from openmeter_plugin.cli import main as plugin_cli
    from syncd.cli import main as syncd_cli

    found: dict[tuple[str, ...], set[str]] = {}

    def walk(path: tuple[str, ...], command: Any) -> None:
        found[path] = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        for name, inner in getattr(command, "commands", {}).items():
            found[path].add("...")
            walk((*path, name), inner)

    walk(("openmeter-plugin",), typer.main.get_command(plugin_cli.app))
    walk(("syncd",), typer.main.get_command(syncd_cli.app))
    return found


def our_commands() -> list[tuple[str, ...]]:
    """Return the words of each command of ours, in shell blocks (run or not, in containers) and in text."""
    lines = [line for script in scripts() for line in script.replace("\\\n", " ").splitlines()]
    lines += [code for page in PAGES for code in re.findall(r"`([^`]+)`", prose(ROOT / page))]
    for template in (ROOT / "syncd" / "dashboard" / "templates").glob("*.html"):
        shown = re.sub(r"{{.*?}}", "VALUE", template.read_text())
        lines += re.findall(r"<code>((?:syncd|openmeter-plugin) [^<]+)</code>", shown)
    found = set()
    for line in lines:
        typed = re.split(r" -- | exec syncd (?=syncd)", line)[-1]
        for program, rest in re.findall(r"(?:^|bin/|\$\()(syncd|openmeter-plugin) ([^#&>|)]+)", typed):
            found.add((program, *rest.split()))
    return sorted(found)


def test_every_command_and_option_of_ours_exists(helped: dict[tuple[str, ...], set[str]]) -> None:
    assert len(our_commands()) > 60
    for words in our_commands():
        path = words[:1]
        for word in words[1:]:
            if (*path, word) in helped:
                path = (*path, word)
        options = {word.split("=")[0] for word in words if word.startswith("-")}
        assert options <= helped[path] | helped[words[:1]], words
        if "..." in helped[path]:
            # Nothing that may be a command misspelt: only options, or a place for one.
            assert all(re.match(r"-|<command|\.\.\.", word) for word in words[len(path) :]), words


def test_every_target_and_variable_of_make_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    typed = [line for script in scripts() for line in script.splitlines() if line.startswith("make ")]
    typed += [code for page in PAGES for code in re.findall(r"`(make [^`]+)`", prose(ROOT / page))]
    assert len(typed) > 10
    for line in typed:
        for word in shlex.split(line, comments=True)[1:]:
            name, given, _ = word.partition("=")
            assert name in makefile if given else name in targets, line


def test_every_path_of_the_repository_in_a_command_exists() -> None:
    named = {
        path for script in scripts() for path in re.findall(r"(?:^|[ =@])((?:docs|\.ci)/[\w./-]+)", script)
    }
    assert named
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def named(block: Block) -> str:
    return f"{block.page}:{block.text[:30]!r}"


@pytest.mark.parametrize("block", [block for block in ALL if block.kind == "yaml"], ids=named)
def test_a_yaml_block_has_only_settings_that_exist(block: Block) -> None:
    document = yaml.safe_load(block.text)
    ours = {name for field in FIELDS for name in field}
    if "plugins" in document:
        configs = [plugin["config"] for plugin in document["plugins"] if plugin["name"] == "openmeter"]
        assert all(set(config) <= ours for config in configs)
    elif "gateway" in document:
        assert block.page == "docs/gate.md", "values of Kong's chart, which is not at hand here"
    elif "patches" in document:
        assert block.page == "docs/observability.md", "tests.deploy.test_observability applies that one"
    elif block.page == "docs/gate.md" and "features" in document:
        Settings.model_validate(document)
    elif set(document) <= set(Config.model_fields):
        Config(
            **({"sources": [{"type": "static", "subjects": []}], "metering": {"url": "http://m"}} | document)
        )
    else:
        assert set(document) <= ours | {"http_log"}


@pytest.mark.parametrize(
    "block", [block for block in ALL if block.kind in {"json", "csv", "promql"}], ids=named
)
def test_a_block_of_data_can_be_read(block: Block) -> None:
    match block.kind:
        case "json":
            json.loads(block.text)
        case "csv":
            head, *rows = csv.reader(block.text.splitlines())
            assert rows
            assert all(len(row) == len(head) for row in rows)
        case "promql":
            promql_parser.parse(block.text)


def test_no_block_is_of_a_kind_that_nobody_checks() -> None:
    # What a diagram shows is held to pyproject.toml by test_docs_development.py.
    kinds = {"sh", "console", "text", "yaml", "json", "csv", "promql", "ini", "mermaid"}
    assert {block.kind for block in ALL} <= kinds


def test_every_block_has_a_kind() -> None:
    for page in PAGES:
        fences = re.findall(r"^```(\w*)$", (ROOT / page).read_text(), re.MULTILINE)
        assert all(fences[::2]), page
        assert not any(fences[1::2]), page


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings_that_exist(page: str) -> None:
    path = ROOT / page
    for file, anchor in links(path):
        target = path.parent / file if file else path
        assert target.exists(), file
        if anchor:
            assert anchor in anchors(target), f"{file}#{anchor}"


def test_every_page_of_the_documentation_can_be_reached_from_the_readme() -> None:
    reached, open_pages = set(), [ROOT / "README.md"]
    while open_pages:
        page = open_pages.pop().resolve()
        if page in reached or page.suffix != ".md":
            continue
        reached.add(page)
        open_pages += [page.parent / file for file, _ in links(page) if file]
    assert [page for page in PAGES if (ROOT / page).resolve() not in reached] == []


KONG_COMMAND = re.compile(r"(?i)PLUGINSERVER_\w+_(?:START|QUERY)_CMD(?:\s*[=:]\s*|, value: )([^\n}]+)")
PROGRAMS = {"env", "openmeter-plugin", "kong-python-pluginserver", "cat", "luajit"}


def test_commands_that_kong_runs_name_programs_by_their_paths_and_substitute_nothing() -> None:
    files = [*(ROOT / page for page in PAGES), ROOT / "docker-compose.yml", *(ROOT / "docs").rglob("*.yaml")]
    found = [line for file in files for line in KONG_COMMAND.findall(file.read_text())]
    assert len(found) >= 6
    for line in found:
        # Kong runs them without the operator's PATH, and a $(...) that fails is an empty argument.
        assert "$(" not in line, line
        assert line.startswith("/"), line
        assert not PROGRAMS & set(line.split()), line
