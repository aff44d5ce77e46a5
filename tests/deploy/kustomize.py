"""The manifests of docs/examples/kubernetes as kustomize renders them."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any, Final

import yaml

from tests.deploy.files import ROOT
from tests.deploy.tools import tool

KUBERNETES: Final = ROOT / "docs" / "examples" / "kubernetes"

Manifest = dict[str, Any]


def render(folder: Path) -> list[Manifest]:
    """Return the objects that `kustomize build` prints for a folder."""
    return deepcopy(_built(folder))


def rendered(folder: Path, *components: Path) -> list[Manifest]:
    """Return the objects of a folder with further components."""
    with tempfile.TemporaryDirectory() as overlay:
        document = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "resources": [os.path.relpath(folder, Path(overlay).resolve())],
            "components": [os.path.relpath(path, Path(overlay).resolve()) for path in components],
        }
        (Path(overlay) / "kustomization.yaml").write_text(yaml.safe_dump(document))
        return _build(Path(overlay))


def containers(pod: Manifest) -> list[Manifest]:
    """Return all containers of a pod's spec, sidecars included."""
    return [*pod.get("initContainers", ()), *pod["containers"]]


def pod_spec(manifest: Manifest) -> Manifest:
    """Return the pod's spec of a workload."""
    spec: Manifest = manifest["spec"]["template"]["spec"]
    return spec


def the(manifests: list[Manifest], kind: str, name: str) -> Manifest:
    """Return the one of this kind and name, with or without the hash of a generated name."""
    pattern = re.compile(rf"{re.escape(name)}(-[a-z0-9]{{10}})?")
    (found,) = (m for m in manifests if m["kind"] == kind and pattern.fullmatch(m["metadata"]["name"]))
    return found


@cache
def _built(folder: Path) -> list[Manifest]:
    return _build(folder)


def _build(folder: Path) -> list[Manifest]:
    done = subprocess.run([str(tool("kustomize")), "build", str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]
