"""The values for Kong's own charts and its operator: the same plugin server beside Kong as in our chart."""

from __future__ import annotations

import re
from copy import deepcopy
from typing import Any

import pytest
import yaml

from openmeter_plugin import __version__
from openmeter_plugin.config.instance_config import parse_config
from tests.deploy.helm import HELM, Manifest, pod_spec, render, the
from tests.deploy.tools import needs

KONG = HELM / "kong"
SHARED = {"socket": "openmeter-socket", "spool": "openmeter-spool", "api-token": "openmeter-token"}
"""Our names of volumes, and those in a pod that is not ours."""

pytestmark = pytest.mark.slow


def loaded(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((KONG / f"{name}.yaml").read_text())
    return found


def operators_pod() -> Manifest:
    found: Manifest = loaded("operator")["spec"]["dataPlaneOptions"]["deployment"]["podTemplateSpec"]["spec"]
    return found


def ours() -> Manifest:
    """The pod of our gateway whose spool ends with it."""
    return pod_spec(the(render("gateways", "without-volumes"), "Deployment", "gateway"))


def by_name(entries: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for entry in entries}


@needs("helm")
def test_the_sidecar_is_that_of_our_chart() -> None:
    (wanted,) = deepcopy(ours()["initContainers"])
    names = SHARED | {"plugin-tmp": "openmeter-tmp"}
    for mount in wanted["volumeMounts"]:
        mount["name"] = names[mount["name"]]
    del wanted["imagePullPolicy"]
    wanted["image"] = f"kong-openmeter/plugin:{__version__}"
    assert loaded("kong")["deployment"]["initContainers"] == [wanted]


@needs("helm")
def test_the_pod_has_the_volumes_the_group_and_the_time_of_our_chart() -> None:
    values, pod = loaded("kong"), ours()
    volumes = by_name(values["deployment"]["userDefinedVolumes"])
    wanted = by_name(pod["volumes"])
    assert volumes["openmeter-spool"]["emptyDir"] == wanted["spool"]["emptyDir"]
    assert volumes["openmeter-token"]["secret"]["items"] == wanted["api-token"]["secret"]["items"]
    assert values["terminationGracePeriodSeconds"] == pod["terminationGracePeriodSeconds"]
    group = ("fsGroup", "fsGroupChangePolicy")
    assert values["securityContext"] == {name: pod["securityContext"][name] for name in group}


@needs("helm")
def test_kong_is_configured_as_in_our_chart() -> None:
    values, (kong,) = loaded("kong"), ours()["containers"]
    wanted = {entry["name"]: entry.get("value") for entry in kong["env"]}
    env = {f"KONG_{name.upper()}": value for name, value in values["env"].items()}
    assert env == {name: value for name, value in wanted.items() if re.search("PLUGIN", name)}
    assert {name.upper() for name in values["customEnv"]} == {
        e["name"] for e in kong["env"] if "valueFrom" in e
    }
    (mount,) = values["deployment"]["userDefinedVolumeMounts"]
    (same,) = (m for m in kong["volumeMounts"] if m["name"] == "socket")
    assert mount == same | {"name": SHARED["socket"]}


def test_the_chart_of_the_ingress_controller_gets_the_same_for_its_gateway() -> None:
    assert loaded("ingress") == {"gateway": loaded("kong")}


def test_the_operator_gets_the_same() -> None:
    values, pod = loaded("kong"), operators_pod()
    (proxy,) = pod["containers"]
    assert pod["initContainers"] == values["deployment"]["initContainers"]
    assert pod["volumes"] == values["deployment"]["userDefinedVolumes"]
    assert proxy["volumeMounts"] == values["deployment"]["userDefinedVolumeMounts"]
    for key in ("securityContext", "terminationGracePeriodSeconds"):
        assert pod[key] == values[key]
    plain = {entry["name"]: entry["value"] for entry in proxy["env"] if "value" in entry}
    assert plain == {f"KONG_{name.upper()}": value for name, value in values["env"].items()}
    (token,) = (entry for entry in proxy["env"] if "valueFrom" in entry)
    assert {token["name"].lower(): {"valueFrom": token["valueFrom"]}} == values["customEnv"]


def test_the_plugin_resource_has_a_configuration_that_the_plugin_takes() -> None:
    resource = loaded("plugin")
    assert resource["plugin"] == "openmeter"
    assert resource["config"]["api_token"] == "{vault://env/openmeter-api-token}"
    parse_config(resource["config"] | {"api_token": "token"})
