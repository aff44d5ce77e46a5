"""Pods of the chart, run by ``podman play kube``.

What a kubelet would do first is done here: volumes become folders of this machine, filled from the chart's
ConfigMaps and Secrets, references to Secrets become values. A sidecar becomes a container like the others,
because this podman waits for the end of every init container. Pods are on the host's network, so they have no
ports of their own, and addresses are replaced.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import yaml

from tests.deploy.helm import Manifest, containers, pod_spec, the
from tests.images.containers import USER, Container
from tests.images.engine import Engine

LEFT_OUT: Final = "kong"
"""The container for which there is no image here."""


@contextmanager
def playing(
    engine: Engine,
    manifests: list[Manifest],
    workload: Manifest,
    folder: Path,
    replaced: Mapping[str, str],
    *,
    start: bool = True,
) -> Iterator[dict[str, Container]]:
    """Run the pod of a workload until the end of the block; yields its containers by name.

    Without `start` they are made, and wait.
    """
    spec = pod_spec(workload)
    name = workload["metadata"]["name"]
    folder.mkdir(parents=True)
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name},
        "spec": {
            "hostNetwork": True,
            "restartPolicy": "Never",
            "securityContext": {"supplementalGroups": [spec["securityContext"]["fsGroup"]]},
            "containers": [_container(one, manifests) for one in containers(spec) if one["name"] != LEFT_OUT],
            "volumes": [
                {"name": volume, "hostPath": {"path": str(path), "type": "Directory"}}
                for volume, path in _volumes(workload, manifests, folder).items()
            ],
        },
    }
    text = yaml.safe_dump(pod)
    for old, new in replaced.items():
        assert old in text, old
        text = text.replace(old, new)
    file = folder / "pod.yaml"
    file.write_text(text)
    try:
        engine.run("podman", "play", "kube", f"--start={start}".lower(), "--network", "host", str(file))
        names = [one["name"] for one in pod["spec"]["containers"]]  # type: ignore[index]
        yield {one: Container(engine, f"{name}-{one}") for one in names}
    finally:
        engine.run("podman", "pod", "rm", "--force", "--ignore", "--time", "0", name)


def _container(container: Manifest, manifests: list[Manifest]) -> Manifest:
    found = {key: value for key, value in container.items() if not key.endswith("Probe")}
    for name in ("restartPolicy", "lifecycle", "ports", "resources"):  # there are no cgroups to limit here
        found.pop(name, None)
    found["image"] = f"localhost/{container['image'].partition(':')[0]}:latest"
    found["imagePullPolicy"] = "Never"
    found["env"] = [_variable(entry, manifests) for entry in container.get("env", ())]
    return found


def _variable(entry: Manifest, manifests: list[Manifest]) -> Manifest:
    if "valueFrom" not in entry:
        return entry
    reference = entry["valueFrom"]["secretKeyRef"]
    secret = the(manifests, "Secret", reference["name"])
    return {"name": entry["name"], "value": secret["stringData"][reference["key"]]}


def _volumes(workload: Manifest, manifests: list[Manifest], folder: Path) -> dict[str, Path]:
    found = {}
    claims = [claim["metadata"]["name"] for claim in workload["spec"].get("volumeClaimTemplates", ())]
    for volume in [*pod_spec(workload)["volumes"], *({"name": claim} for claim in claims)]:
        place = folder / volume["name"]
        place.mkdir()
        for name, text in _content(volume, manifests).items():
            (place / name).write_text(text)
        os.chown(place, USER, USER)
        place.chmod(0o2770)
        found[volume["name"]] = place
    return found


def _content(volume: Manifest, manifests: list[Manifest]) -> dict[str, str]:
    """What a volume has at its start."""
    content: dict[str, str] = {}
    for source in volume.get("projected", {}).get("sources", [volume]):
        if "configMap" in source:
            content |= the(manifests, "ConfigMap", source["configMap"]["name"])["data"]
        elif "secret" in source:
            texts: dict[str, Any] = the(manifests, "Secret", source["secret"]["secretName"])["stringData"]
            content |= {item["path"]: texts[item["key"]] for item in source["secret"]["items"]}
    return content
