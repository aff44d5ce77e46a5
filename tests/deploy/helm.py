"""The chart of docs/examples/helm as helm renders it."""

from __future__ import annotations

import subprocess
from copy import deepcopy
from functools import cache
from typing import Any, Final

import yaml

from tests.deploy.files import ROOT
from tests.deploy.tools import tool

HELM: Final = ROOT / "docs" / "examples" / "helm"
CHART: Final = HELM / "kong-openmeter"
VALUES: Final = HELM / "values"
RELEASE: Final = "metering"
"""The name that the values of the examples go by."""
FIRST: Final = "1.29.0"
"""The first version of Kubernetes with sidecars on by default."""

_TOKENS: Final = {
    "secret": {
        "meteringToken": "metering-token-of-a-test",
        "syncdToken": "syncd-token-of-a-test",
        "pluginApiToken": "plugin-token-of-a-test",
    }
}

Manifest = dict[str, Any]


class RefusedError(Exception):
    """helm does not render these values; says why."""


def render(*examples: str) -> list[Manifest]:
    """Return the objects for files of docs/examples/helm/values, given without their ending."""
    return deepcopy(_rendered(examples))


def rendered_with(values: dict[str, Any], *examples: str) -> list[Manifest]:
    """Return the objects for further values on top; raises RefusedError."""
    return [document for document in yaml.safe_load_all(text(values, *examples)) if document]


def text(values: dict[str, Any], *examples: str) -> str:
    """Return what helm prints; raises RefusedError."""
    command = [str(tool("helm")), "template", RELEASE, str(CHART), "--namespace", "kong-openmeter"]
    command += ["--kube-version", FIRST]
    for name in examples:
        command += ["--values", str(VALUES / f"{name}.yaml")]
    done = subprocess.run(
        [*command, "--values", "-"], input=yaml.safe_dump(values), capture_output=True, text=True
    )
    if done.returncode:
        raise RefusedError(done.stderr)
    return done.stdout


def containers(pod: Manifest) -> list[Manifest]:
    """Return all containers of a pod's spec, sidecars included."""
    return [*pod.get("initContainers", ()), *pod["containers"]]


def pod_spec(manifest: Manifest) -> Manifest:
    """Return the pod's spec of a workload."""
    spec: Manifest = manifest["spec"]["template"]["spec"]
    return spec


def the(manifests: list[Manifest], kind: str, name: str) -> Manifest:
    """Return the one of this kind and name; the release's name before it may be left out."""
    names = {name, f"{RELEASE}-{name}"}
    (found,) = (m for m in manifests if m["kind"] == kind and m["metadata"]["name"] in names)
    return found


@cache
def _rendered(examples: tuple[str, ...]) -> list[Manifest]:
    return rendered_with(_TOKENS, *examples)
