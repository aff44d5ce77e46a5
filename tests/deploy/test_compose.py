"""What docker-compose.yml promises, as far as it can be seen without a Docker engine."""

from __future__ import annotations

import json
import re
from importlib import resources
from urllib.parse import urlsplit

import pytest
import yaml
from jsonschema import Draft7Validator

from tests.deploy.files import COMPOSE, ROOT, compose, mounts, service

pytestmark = pytest.mark.slow

SERVICES = sorted(compose()["services"])
OWN = ["plugin", "sandbox", "syncd"]

KONG_SETTINGS = {
    *("DATABASE", "DECLARATIVE_CONFIG", "PLUGINS", "PLUGINSERVER_NAMES"),
    *("PROXY_LISTEN", "ADMIN_LISTEN", "ADMIN_GUI_LISTEN"),
}
"""Settings of kong.conf that the compose file uses; Kong ignores a misspelt one without a word."""


def kong_settings() -> dict[str, str]:
    environment: dict[str, str] = service("kong")["environment"]
    return {k.removeprefix("KONG_"): v for k, v in environment.items() if k.startswith("KONG_")}


def test_the_file_is_what_the_compose_specification_allows() -> None:
    schema = json.loads(
        resources.files("check_jsonschema").joinpath("builtin_schemas/vendor/compose-spec.json").read_text()
    )
    merged = {key: value for key, value in compose().items() if not key.startswith("x-")}
    Draft7Validator.check_schema(schema)
    assert [error.message for error in Draft7Validator(schema).iter_errors(merged)] == []


@pytest.mark.parametrize("name", SERVICES)
def test_images_that_are_not_ours_have_a_full_version(name: str) -> None:
    parts = 2 if name == "postgres" else 3  # as its versions are made
    if name not in OWN:
        assert re.search(rf":v?\d+(\.\d+){{{parts - 1}}}(-[\w.]+)?$", service(name)["image"])


def test_every_path_of_the_host_that_is_mounted_or_built_from_exists() -> None:
    paths = [source for name in SERVICES for source in mounts(name).values() if source.startswith(".")]
    paths += [service(name)["build"]["dockerfile"] for name in OWN]
    assert len(paths) >= 6
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_every_volume_and_config_that_a_service_uses_is_declared_and_the_other_way_round() -> None:
    volumes = {source for name in SERVICES for source in mounts(name).values() if not source.startswith(".")}
    assert volumes == set(compose()["volumes"])
    configs = {entry["source"] for name in SERVICES for entry in service(name).get("configs", ())}
    assert configs == set(compose()["configs"])


def test_ports_are_published_on_loopback_only() -> None:
    ports = [port for name in SERVICES for port in service(name).get("ports", ())]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports), ports


def test_kong_starts_only_once_the_plugin_server_is_healthy() -> None:
    assert service("kong")["depends_on"]["plugin"] == {"condition": "service_healthy"}


@pytest.mark.parametrize("name", SERVICES)
def test_whoever_must_be_healthy_first_has_a_healthcheck(name: str) -> None:
    for other, dependency in service(name).get("depends_on", {}).items():
        if dependency["condition"] == "service_healthy":
            assert service(other)["healthcheck"]["test"][0] == "CMD"


def test_kong_uses_only_settings_that_exist() -> None:
    settings = set(kong_settings())
    plugin_server = {"PLUGINSERVER_OPENMETER_SOCKET", "PLUGINSERVER_OPENMETER_QUERY_CMD"}
    assert settings == KONG_SETTINGS | plugin_server


def test_kong_uses_the_plugin_server_and_does_not_start_it() -> None:
    settings = kong_settings()
    assert settings["PLUGINS"].split(",") == ["bundled", "openmeter"]
    assert settings["PLUGINSERVER_NAMES"] == "openmeter"
    assert "PLUGINSERVER_OPENMETER_START_CMD" not in settings


def test_kong_looks_for_socket_and_info_where_the_plugin_server_puts_them() -> None:
    settings = kong_settings()
    script = (ROOT / "plugin" / "docker-entrypoint.sh").read_text()
    dockerfile = (ROOT / "plugin" / "Dockerfile").read_text()
    folder = re.search(r"OPENMETER_PLUGIN_RUN=(\S+)", dockerfile)
    assert folder is not None
    assert "run=${OPENMETER_PLUGIN_RUN:-/run/openmeter}\n" in script
    assert '--socket "$run/openmeter.socket"' in script
    assert 'openmeter-plugin files "$run"' in script
    assert settings["PLUGINSERVER_OPENMETER_SOCKET"] == f"{folder[1]}/openmeter.socket"
    assert settings["PLUGINSERVER_OPENMETER_QUERY_CMD"] == f"/bin/cat {folder[1]}/info.json"
    assert mounts("kong")[folder[1]] == mounts("plugin")[folder[1]]


def test_kong_is_in_the_group_that_may_use_the_socket() -> None:
    gid = re.search(r"groupadd --gid (\d+)", (ROOT / "plugin" / "Dockerfile").read_text())
    assert gid is not None
    assert service("kong")["group_add"] == [gid[1]]


def test_the_spool_is_on_a_volume_of_its_own() -> None:
    spool = re.search(r"OPENMETER_PLUGIN_SPOOL=(\S+)", (ROOT / "plugin" / "Dockerfile").read_text())
    assert spool is not None
    (volume,) = (v for target, v in mounts("plugin").items() if spool[1].startswith(f"{target}/"))
    assert [name for name in SERVICES if volume in mounts(name).values()] == ["plugin"]


@pytest.mark.parametrize("name", OWN)
def test_our_containers_have_an_init_and_no_privileges(name: str) -> None:
    own = service(name)
    assert own["init"] is True
    assert own["read_only"] is True
    assert own["cap_drop"] == ["ALL"]
    assert own["security_opt"] == ["no-new-privileges:true"]


def test_one_variable_is_the_token_of_all_three() -> None:
    variables = re.findall(r"(\w+): \$\{OPENMETER_API_TOKEN:-sandbox-token\}", COMPOSE.read_text())
    assert sorted(variables) == ["OPENMETER_API_TOKEN", "SYNCD_METERING__TOKEN", "SYNCD_SANDBOX_TOKEN"]


def test_kong_yml_speaks_to_services_of_the_compose_file_on_the_ports_where_they_listen() -> None:
    document = yaml.safe_load((ROOT / "kong.yml").read_text())
    upstreams = {urlsplit(entry["url"]).netloc for entry in document["services"]}
    (nginx,) = re.findall(r"listen (\d+);", compose()["configs"]["upstream"]["content"])
    assert upstreams == {f"upstream:{nginx}"}
    (plugin,) = (entry for entry in document["plugins"] if entry["name"] == "openmeter")
    command = service("sandbox")["command"]
    port = command[command.index("--port") + 1]
    assert urlsplit(plugin["config"]["ingest_endpoint"]).netloc == f"sandbox:{port}"
    assert service("syncd")["environment"]["SYNCD_METERING__URL"] == f"http://sandbox:{port}"


def test_the_token_in_kong_yml_is_the_variable_that_kong_gets() -> None:
    document = yaml.safe_load((ROOT / "kong.yml").read_text())
    (plugin,) = (entry for entry in document["plugins"] if entry["name"] == "openmeter")
    reference = re.fullmatch(r"\{vault://env/([a-z-]+)\}", plugin["config"]["api_token"])
    assert reference is not None
    assert reference[1].upper().replace("-", "_") in service("kong")["environment"]
