"""The command line `openmeter-plugin`, as Kong and operators call it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lupa import luajit21

from openmeter_plugin import __version__
from openmeter_plugin.config.schema import FIELDS

pytestmark = pytest.mark.slow


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "openmeter_plugin", *arguments],
        capture_output=True,
        text=True,
        timeout=30,
        env=os.environ | environment,
    )


def test_info_prints_one_json_document_and_nothing_else() -> None:
    result = run("info")
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads(result.stdout) == {
        "Protocol": "ProtoBuf:1",
        "Plugins": [
            {
                "Name": "openmeter",
                "Phases": ["log"],
                "Priority": 15,
                "Version": __version__,
                "Schema": {
                    "name": "openmeter",
                    "fields": [{"config": {"type": "record", "fields": FIELDS}}],
                },
            }
        ],
    }


def test_info_as_lua_prints_the_same_document_under_luajit() -> None:
    program = run("info", "--lua").stdout
    printed: list[str] = []
    lua = luajit21.LuaRuntime()
    lua.globals()["io"]["write"] = printed.append
    lua.execute(program)
    assert printed == [run("info").stdout]


def test_info_imports_nothing_slow() -> None:
    code = """
import sys
from openmeter_plugin.__main__ import main
sys.argv[1:] = ["info"]
main()
print(sorted({"typer", "pydantic", "httpx", "uvloop", "structlog"} & set(sys.modules)), file=sys.stderr)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stderr.strip() == "[]"


def test_info_with_verbose_python_flags_in_the_environment_still_prints_only_json() -> None:
    assert json.loads(run("info", PYTHONDEVMODE="1").stdout)["Protocol"] == "ProtoBuf:1"


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("sp", ["spool"]),
        ("spool d", ["dead-letters", "drain"]),
        ("serve --so", ["--socket", "--socket-mode"]),
        ("serve --fsync ", ["always", "interval", "never"]),
        ("spool drain --t", ["--timeout", "--token-file"]),
    ],
)
def test_shell_completion_knows_commands_options_and_values(typed: str, completed: list[str]) -> None:
    words = f"openmeter-plugin {typed}"
    result = run(
        _OPENMETER_PLUGIN_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=str(words.count(" "))
    )
    assert (sorted(result.stdout.split()), result.stderr) == (completed, "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_has_a_completion_script(shell: str) -> None:
    script = run("--show-completion", shell)
    assert "_OPENMETER_PLUGIN_COMPLETE=complete" in script.stdout
    assert "openmeter-plugin" in script.stdout


def test_the_help_shows_the_programs_name_even_with_python_m() -> None:
    assert "Usage: openmeter-plugin serve " in run("serve", "--help").stdout


def test_version_prints_the_packages_version() -> None:
    assert run("--version").stdout == f"openmeter-plugin {__version__}\n"


@pytest.mark.parametrize("arguments", [("serve",), ("serve", "--sokcet", "x"), ("bogus",)])
def test_a_usage_error_exits_with_64(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.returncode == os.EX_USAGE
    assert result.stdout == ""


def test_a_usage_error_leaves_no_socket_behind(tmp_path: Path) -> None:
    socket = tmp_path / "s"
    assert run("serve", "--socket", str(socket), "--bogus").returncode == os.EX_USAGE
    assert not socket.exists()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"--socket": "{dir}/missing/s", "--spool": "{dir}/spool"}, "--socket"),
        ({"--socket": "{dir}/s", "--spool": "/proc/nothing/spool"}, "--spool"),
        ({"--socket": "{dir}/s", "--spool": "{dir}/spool", "--socket-mode": "rw"}, "--socket-mode"),
    ],
)
def test_an_unusable_option_fails_at_the_start_and_is_named(
    tmp_path: Path, options: dict[str, str], named: str
) -> None:
    arguments = [word.format(dir=tmp_path) for option in options.items() for word in option]
    result = run("serve", *arguments)
    assert result.returncode != 0
    assert result.stderr.startswith(f"openmeter-plugin: {named}")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("option", ["--socket", "--http-log", "--api"])
def test_a_file_that_is_not_a_socket_is_never_replaced_by_one(tmp_path: Path, option: str) -> None:
    file = tmp_path / "s"
    file.write_text("somebody's")
    address = str(file) if option == "--socket" else f"unix:{file}"
    arguments = [option, address, "--spool", str(tmp_path / "spool")]
    if option == "--api":
        arguments += ["--socket", str(tmp_path / "other")]
    result = run("serve", *arguments)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith(f"openmeter-plugin: {option}: ")
    assert f"{file}: there is a file that is not a socket" in result.stderr
    assert "Traceback" not in result.stderr
    assert file.read_text() == "somebody's"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["serve", "--socket="], "--socket"),
        (["serve", "--socket", ""], "--socket"),
        (["serve", "--http-log", ""], "--http-log"),
        (["serve", "--socket", "s", "--spool="], "--spool"),
        (["deliver", "--spool", ""], "--spool"),
        (["serve", "--socket", "s", "--token-file="], "--token-file"),
        (["serve", ""], "an argument"),
        (["spool", "status", "--spool", ""], "--spool"),
    ],
)
def test_an_empty_argument_is_refused_since_a_substitution_has_failed(
    tmp_path: Path, arguments: list[str], named: str
) -> None:
    command = [sys.executable, "-m", "openmeter_plugin", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=tmp_path)
    assert result.returncode == os.EX_USAGE
    assert result.stderr.startswith(f"openmeter-plugin: {named}: is empty")
    assert list(tmp_path.iterdir()) == []


def test_the_directory_for_stock_kong_pdk_contains_only_the_plugin() -> None:
    directory = Path(run("pdk-dir").stdout.strip())
    assert [path.name for path in directory.glob("*.py")] == ["openmeter.py"]


def test_stock_kong_pdk_loads_the_plugin_with_the_same_schema(tmp_path: Path) -> None:
    command = [
        *(str(Path(sys.executable).with_name("kong-python-pluginserver")), "--dump-all-plugins"),
        *("-d", run("pdk-dir").stdout.strip(), "-p", str(tmp_path)),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    (plugin,) = json.loads(result.stdout)
    expected: dict[str, Any] = json.loads(run("info").stdout)["Plugins"][0]
    assert plugin == expected


def test_what_a_gateway_needs_is_written_where_kong_looks_for_it(tmp_path: Path) -> None:
    result = run("files", str(tmp_path / "lua"))
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"lua_package_path = {tmp_path}/lua/?.lua;;\n"
    written = {
        str(file.relative_to(tmp_path)): file.read_text() for file in tmp_path.rglob("*") if file.is_file()
    }
    plugins = {
        "openmeter-gate": ("decide", "feed", "generated", "handler", "schema"),
        "openmeter": ("generated", "handler", "instances", "record", "schema", "segments"),
    }
    assert sorted(written) == [
        "lua/info.json",
        "lua/info.lua",
        *(f"lua/kong/plugins/{plugin}/{name}.lua" for plugin, names in plugins.items() for name in names),
    ]
    assert written["lua/info.json"] == run("info").stdout
    assert written["lua/info.lua"] == run("info", "--lua").stdout
    compiled = luajit21.LuaRuntime(unpack_returned_tuples=True).eval("loadstring")
    assert all(callable(compiled(text)) for name, text in written.items() if name.endswith(".lua"))
    again = run("files", str(tmp_path / "lua"))
    assert again.returncode == 0


def test_the_gate_for_post_function_is_a_text_that_compiles() -> None:
    result = run("gate", "lua", "--socket", "/run/g.sock", "--mode", "shadow", "--feature", "requests")
    assert (result.returncode, result.stderr) == (0, "")
    assert 'socket = "/run/g.sock", mode = "shadow", features = { "requests" }' in result.stdout
    assert callable(luajit21.LuaRuntime(unpack_returned_tuples=True).eval("loadstring")(result.stdout))


@pytest.mark.parametrize(
    ("option", "value"), [("--socket", "relative"), ("--mode", "on"), ("--feature", "No such")]
)
def test_a_wrong_option_of_gate_lua_is_named(option: str, value: str) -> None:
    result = run("gate", "lua", option, value)
    assert (result.returncode, result.stdout) == (64, "")
    assert result.stderr.startswith(f"openmeter-plugin: {option}: {value} ")


def test_a_place_where_the_lua_plugin_cannot_be_written_is_named() -> None:
    result = run("files", "/proc/nothing")
    assert result.returncode == 1
    assert result.stderr.startswith("openmeter-plugin: cannot write /proc/nothing")
