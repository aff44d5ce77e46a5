"""The manifests of docs/examples/kubernetes, rendered as far as they use kustomize.

resources, components, images, configMapGenerator (without the hash in the names) and JSON 6902 patches with a
target. `kubectl kustomize` renders the same, where there is one: a test compares the two.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import jsonpatch
import yaml

from tests.deploy.files import ROOT

KUBERNETES: Final = ROOT / "docs" / "examples" / "kubernetes"
KNOWN: Final = {
    *("apiVersion", "kind", "namespace", "resources", "components"),
    *("images", "configMapGenerator", "patches"),
}

Manifest = dict[str, Any]


def kustomization(folder: Path) -> Manifest:
    """Return what kustomization.yaml of a folder says; fails where it says more than is understood here."""
    said: Manifest = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert set(said) <= KNOWN, f"{folder}: {set(said) - KNOWN}"
    return said


def render(folder: Path) -> list[Manifest]:
    """Return the objects that a folder stands for."""
    said = kustomization(folder)
    if said["kind"] == "Component":
        return _apply(said, folder, [])
    return _with_components(said, folder, _apply(said, folder, []))


def rendered(folder: Path, *components: Path) -> list[Manifest]:
    """Return the objects of a folder with further components."""
    return _with_components({"components": [str(path) for path in components]}, folder, render(folder))


def containers(pod: Manifest) -> list[Manifest]:
    """Return all containers of a pod's spec, the sidecars among them."""
    return [*pod.get("initContainers", ()), *pod["containers"]]


def pod_spec(manifest: Manifest) -> Manifest:
    """Return the pod's spec of a workload."""
    spec: Manifest = manifest["spec"]["template"]["spec"]
    return spec


def the(manifests: list[Manifest], kind: str, name: str) -> Manifest:
    """Return the one of this kind and name."""
    (found,) = (m for m in manifests if m["kind"] == kind and m["metadata"]["name"] == name)
    return found


def _with_components(said: Manifest, folder: Path, manifests: list[Manifest]) -> list[Manifest]:
    for path in said.get("components", ()):
        inner = (folder / path).resolve()
        manifests = _apply(kustomization(inner), inner, manifests)
    return manifests


def _apply(said: Manifest, folder: Path, manifests: list[Manifest]) -> list[Manifest]:
    found = [*manifests]
    for resource in said.get("resources", ()):
        path = folder / resource
        found += render(path.resolve()) if path.is_dir() else _documents(path)
    for entry in said.get("configMapGenerator", ()):
        generated = _config_map(entry, folder)
        if entry.get("behavior") == "replace":
            the(found, "ConfigMap", entry["name"])["data"] = generated["data"]
        else:
            found.append(generated)
    for patch in said.get("patches", ()):
        found = _patched(found, patch)
    for manifest in found:
        if "namespace" in said and manifest["kind"] != "Namespace":
            manifest["metadata"]["namespace"] = said["namespace"]
        _set_images(manifest, said.get("images", ()))
    return found


def _documents(path: Path) -> list[Manifest]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def _config_map(entry: Manifest, folder: Path) -> Manifest:
    assert set(entry) <= {"name", "files", "behavior"}
    assert entry.get("behavior") in {None, "replace"}
    data = {Path(file).name: (folder / file).read_text() for file in entry["files"]}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": entry["name"]}, "data": data}


def _patched(manifests: list[Manifest], patch: Manifest) -> list[Manifest]:
    assert set(patch) <= {"target", "patch", "options"}
    target, operations = patch["target"], yaml.safe_load(patch["patch"])
    hit = [m for m in manifests if (m["kind"], m["metadata"]["name"]) == (target["kind"], target["name"])]
    assert hit, f"the patch of {target} hits nothing"
    return [jsonpatch.apply_patch(m, operations) if m in hit else m for m in manifests]


def _set_images(manifest: Manifest, images: list[Manifest]) -> None:
    if "template" not in manifest.get("spec", {}):
        return
    for container in containers(pod_spec(manifest)):
        for image in images:
            if container["image"].partition(":")[0] == image["name"]:
                container["image"] = f"{image['name']}:{image['newTag']}"
