"""What the Kubernetes manifests promise, as far as it can be seen without a cluster."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from openmeter_plugin import __version__
from tests.deploy.files import ROOT, service
from tests.deploy.kustomize import (
    KUBERNETES,
    Manifest,
    containers,
    pod_spec,
    render,
    rendered,
    the,
)
from tests.deploy.tools import needs

FOLDERS = sorted(path.parent for path in KUBERNETES.rglob("kustomization.yaml"))
COMPONENTS = sorted((KUBERNETES / "components").iterdir())
BASE = KUBERNETES / "base"
Whole = Callable[[], list[Manifest]]
WHOLES: dict[str, Whole] = {
    "base": lambda: render(BASE),
    "base-with-components": lambda: rendered(BASE, *COMPONENTS),
    "deployment": lambda: render(KUBERNETES / "overlays" / "deployment"),
    "drain": lambda: render(KUBERNETES / "drain"),
}
FIRST, LATEST = "1.29.0", kubernetes_validate.latest_version()
"""The first version with sidecars on by default, and the last one whose schemas are there."""

pytestmark = [needs("kustomize"), pytest.mark.slow]
wholes = pytest.mark.parametrize("whole", [pytest.param(make, id=name) for name, make in WHOLES.items()])


def workloads(manifests: list[Manifest]) -> list[Manifest]:
    return [m for m in manifests if "template" in m.get("spec", {})]


def gateway_pod(manifests: list[Manifest]) -> tuple[Manifest, Manifest, Manifest]:
    """The pod's spec, the sidecar and Kong."""
    (gateway,) = (m for m in workloads(manifests) if m["metadata"]["name"] == "gateway")
    spec = pod_spec(gateway)
    (plugin,), (kong,) = spec["initContainers"], spec["containers"]
    return spec, plugin, kong


def mounts(container: Manifest) -> dict[str, Manifest]:
    return {mount["mountPath"]: mount for mount in container["volumeMounts"]}


def ports(container: Manifest) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for port in container.get("ports", ())}


def values(container: Manifest) -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in container["env"] if "value" in entry}


# The files


def test_every_manifest_is_named() -> None:
    for folder in FOLDERS:
        document = yaml.safe_load((folder / "kustomization.yaml").read_text())
        named = {folder / path for key in ("resources", "components") for path in document.get(key, ())}
        named |= {
            folder / file for entry in document.get("configMapGenerator", ()) for file in entry["files"]
        }
        assert set(folder.glob("*.yaml")) - {folder / "kustomization.yaml"} <= named, folder


@wholes
@pytest.mark.parametrize("version", [FIRST, LATEST])
def test_every_object_is_what_the_schema_of_kubernetes_allows(whole: Whole, version: str) -> None:
    of_kubernetes = [m for m in whole() if not m["apiVersion"].startswith("monitoring.coreos.com/")]
    assert of_kubernetes
    for manifest in of_kubernetes:
        kubernetes_validate.validate(manifest, version, strict=True)


def test_a_misspelt_field_would_have_been_found() -> None:
    broken = the(render(BASE), "StatefulSet", "gateway")
    pod_spec(broken)["initContainers"][0]["restartPolicies"] = "Always"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, LATEST, strict=True)


def test_our_images_have_the_version_of_the_project() -> None:
    version = __version__
    images = {
        container["image"]
        for make in WHOLES.values()
        for workload in workloads(make())
        for container in containers(pod_spec(workload))
    }
    ours = {image for image in images if image.startswith("kong-openmeter/")}
    assert ours == {f"kong-openmeter/plugin:{version}", f"kong-openmeter/syncd:{version}"}
    assert images - ours == {service("kong")["image"]}


# Names, ports and volumes fit together


@wholes
def test_every_mount_has_its_volume_and_every_volume_is_mounted(whole: Whole) -> None:
    for workload in workloads(whole()):
        spec = pod_spec(workload)
        claimed = {claim["metadata"]["name"] for claim in workload["spec"].get("volumeClaimTemplates", ())}
        volumes = {volume["name"] for volume in spec["volumes"]} | claimed
        mounted = {mount["name"] for container in containers(spec) for mount in container["volumeMounts"]}
        assert mounted == volumes, workload["metadata"]["name"]


@wholes
def test_every_config_map_and_claim_that_is_mounted_is_there(whole: Whole) -> None:
    manifests = whole()
    there = {(m["kind"], m["metadata"]["name"]) for m in manifests}
    for workload in workloads(manifests):
        for volume in pod_spec(workload)["volumes"]:
            sources = volume.get("projected", {}).get("sources", [volume])
            wanted = {("ConfigMap", s["configMap"]["name"]) for s in sources if "configMap" in s}
            if "persistentVolumeClaim" in volume:
                wanted.add(("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]))
            if workload["kind"] == "Job":  # its claim is what a gateway left behind
                wanted -= {("PersistentVolumeClaim", "spool-gateway-2")}
            assert wanted <= there, wanted - there


def test_the_job_drains_a_claim_of_the_gateways() -> None:
    stateful_set = the(render(BASE), "StatefulSet", "gateway")
    (claim,) = stateful_set["spec"]["volumeClaimTemplates"]
    job = the(render(KUBERNETES / "drain"), "Job", "drain")
    (volume,) = (v for v in pod_spec(job)["volumes"] if "persistentVolumeClaim" in v)
    replicas = stateful_set["spec"]["replicas"]
    left_behind = f"{claim['metadata']['name']}-{stateful_set['metadata']['name']}-{replicas}"
    assert volume["persistentVolumeClaim"]["claimName"] == left_behind
    (container,) = pod_spec(job)["containers"]
    _, plugin, _ = gateway_pod(render(BASE))
    where = {path for path, mount in mounts(plugin).items() if mount["name"] == claim["metadata"]["name"]}
    assert where == {path for path, mount in mounts(container).items() if mount["name"] == volume["name"]}
    assert container["args"][-1] in {f"{path}/spool" for path in where}


@wholes
def test_probes_services_and_policies_name_ports_that_exist(whole: Whole) -> None:
    manifests = whole()
    by_name: dict[str, dict[str, int]] = {}
    for workload in workloads(manifests):
        everything = [ports(container) for container in containers(pod_spec(workload))]
        by_name[workload["metadata"]["name"]] = {k: v for found in everything for k, v in found.items()}
        for container in containers(pod_spec(workload)):
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                if "httpGet" in container.get(probe, {}):
                    assert container[probe]["httpGet"]["port"] in ports(container)
    for manifest in manifests:
        name = manifest["metadata"].get("labels", {}).get("app.kubernetes.io/name")
        if manifest["kind"] == "Service":
            assert {port["targetPort"] for port in manifest["spec"]["ports"]} <= set(by_name[name])
        elif manifest["kind"] == "NetworkPolicy" and name in by_name:
            rules = manifest["spec"].get("ingress", [])
            assert {port["port"] for rule in rules for port in rule["ports"]} <= set(by_name[name])
        elif manifest["kind"] == "PodMonitor":
            assert {e["port"] for e in manifest["spec"]["podMetricsEndpoints"]} <= set(by_name[name])


@wholes
def test_every_selector_finds_the_pods_that_it_is_meant_for(whole: Whole) -> None:
    manifests = whole()
    labels = [m["spec"]["template"]["metadata"]["labels"] for m in workloads(manifests)]
    for manifest in manifests:
        spec = manifest.get("spec", {})
        selector = spec.get("podSelector", spec.get("selector"))
        if selector is None or (manifest["kind"] == "NetworkPolicy" and selector == {}):
            continue
        wanted = selector.get("matchLabels", selector)
        if wanted == {"app.kubernetes.io/name": "drain"} and not any(m["kind"] == "Job" for m in manifests):
            continue  # the Job comes when it is needed
        assert any(wanted.items() <= found.items() for found in labels), manifest["metadata"]["name"]


def test_the_job_that_drains_is_let_out() -> None:
    job = the(render(KUBERNETES / "drain"), "Job", "drain")
    policy = the(render(BASE), "NetworkPolicy", "drain")
    wanted = policy["spec"]["podSelector"]["matchLabels"]
    assert wanted.items() <= job["spec"]["template"]["metadata"]["labels"].items()


def test_the_stateful_set_has_its_headless_service() -> None:
    manifests = render(BASE)
    headless = the(manifests, "Service", the(manifests, "StatefulSet", "gateway")["spec"]["serviceName"])
    assert headless["spec"]["clusterIP"] == "None"


# Nobody has more than is needed


@wholes
def test_every_pod_runs_without_root_without_a_token_and_with_a_group_of_its_own(whole: Whole) -> None:
    image_group = re.search(r"groupadd --gid (\d+)", (ROOT / "plugin" / "Dockerfile").read_text())
    assert image_group is not None
    for workload in workloads(whole()):
        spec = pod_spec(workload)
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["securityContext"]["fsGroup"] == int(image_group[1])
        assert spec["securityContext"]["fsGroupChangePolicy"] == "OnRootMismatch"


@wholes
def test_every_container_is_closed(whole: Whole) -> None:
    for workload in workloads(whole()):
        for container in containers(pod_spec(workload)):
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"] is True
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert "add" not in context["capabilities"]
            assert context["runAsUser"] > 0
            assert "memory" in container["resources"]["limits"]


def test_kong_and_the_plugin_server_are_different_users_and_ours_is_that_of_the_image() -> None:
    _, plugin, kong = gateway_pod(render(BASE))
    user = re.search(r"USER (\d+):(\d+)", (ROOT / "plugin" / "Dockerfile").read_text())
    assert user is not None
    ours = plugin["securityContext"]
    assert [ours["runAsUser"], ours["runAsGroup"]] == [int(number) for number in user.groups()]
    assert kong["securityContext"]["runAsUser"] != ours["runAsUser"]


def test_the_namespace_enforces_what_the_pods_keep_to() -> None:
    namespace = the(render(BASE), "Namespace", "kong-openmeter")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    assert {
        m["metadata"]["namespace"] for m in render(BASE) if m is not namespace and m["kind"] != "Namespace"
    } == {"kong-openmeter"}


# The gateway


def test_kong_starts_only_when_the_plugin_server_listens_and_the_info_is_there() -> None:
    _, plugin, _ = gateway_pod(render(BASE))
    assert plugin["restartPolicy"] == "Always"
    healthcheck: list[str] = service("plugin")["healthcheck"]["test"]
    assert ["CMD", *plugin["startupProbe"]["exec"]["command"]] == healthcheck


def test_kong_is_told_what_compose_tells_it() -> None:
    _, _, kong = gateway_pod(render(BASE))
    here, there = values(kong), service("kong")["environment"]
    own = {"KONG_DECLARATIVE_CONFIG", "KONG_PREFIX", "KONG_STATUS_LISTEN", "KONG_NGINX_WORKER_PROCESSES"}
    assert {name for name in here if name not in there} <= own
    same = {name for name in here if name in there} - own
    assert {"KONG_PLUGINSERVER_OPENMETER_SOCKET", "KONG_PLUGINSERVER_OPENMETER_QUERY_CMD"} <= same
    assert {name: here[name] for name in same} == {name: there[name] for name in same}


def test_kong_and_the_plugin_server_share_the_folder_of_the_socket_and_nothing_else() -> None:
    _, plugin, kong = gateway_pod(render(BASE))
    folder = str(Path(values(kong)["KONG_PLUGINSERVER_OPENMETER_SOCKET"]).parent)
    assert mounts(kong)[folder]["name"] == mounts(plugin)[folder]["name"]
    assert mounts(kong)[folder]["readOnly"] is True
    shared = {m["name"] for m in kong["volumeMounts"]} & {m["name"] for m in plugin["volumeMounts"]}
    assert shared == {mounts(kong)[folder]["name"]}
    dockerfile = (ROOT / "plugin" / "Dockerfile").read_text()
    assert f"OPENMETER_PLUGIN_RUN={folder}" in dockerfile


def test_kong_may_write_where_it_must() -> None:
    _, _, kong = gateway_pod(render(BASE))
    assert "readOnly" not in mounts(kong)[values(kong)["KONG_PREFIX"]]
    declarative = Path(values(kong)["KONG_DECLARATIVE_CONFIG"])
    assert mounts(kong)[str(declarative.parent)]["name"] == "kong-config"
    assert declarative.name in the(render(BASE), "ConfigMap", "kong-config")["data"]


def test_the_spool_is_on_a_volume_that_outlives_pod_and_set() -> None:
    gateway = the(render(BASE), "StatefulSet", "gateway")
    _, plugin, _ = gateway_pod(render(BASE))
    spool = re.search(r"OPENMETER_PLUGIN_SPOOL=(\S+)", (ROOT / "plugin" / "Dockerfile").read_text())
    assert spool is not None
    (claim,) = gateway["spec"]["volumeClaimTemplates"]
    (where,) = (path for path in mounts(plugin) if spool[1].startswith(f"{path}/"))
    assert mounts(plugin)[where]["name"] == claim["metadata"]["name"]
    kept = gateway["spec"]["persistentVolumeClaimRetentionPolicy"]
    assert kept == {"whenDeleted": "Retain", "whenScaled": "Retain"}


def test_the_pod_has_time_for_kong_and_then_for_the_plugin_server() -> None:
    spec, _, kong = gateway_pod(render(BASE))
    command: list[str] = kong["lifecycle"]["preStop"]["exec"]["command"]
    assert command[:2] == ["kong", "quit"]
    kongs = sum(int(word.partition("=")[2]) for word in command[2:])
    ours = re.search(
        r"_STOP_SECONDS: Final = (\d+)",
        (ROOT / "plugin" / "openmeter_plugin" / "process" / "supervisor.py").read_text(),
    )
    assert ours is not None
    assert spec["terminationGracePeriodSeconds"] > kongs + int(ours[1])


def test_a_sick_metering_takes_no_gateway_out_of_service_unless_somebody_chose_so() -> None:
    _, plugin, _ = gateway_pod(render(BASE))
    assert "readinessProbe" not in plugin
    _, plugin, _ = gateway_pod(rendered(BASE, KUBERNETES / "components" / "not-ready-without-metering"))
    assert plugin["readinessProbe"]["httpGet"]["path"] == "/readyz"


def test_there_is_always_a_gateway_and_only_ever_one_syncd() -> None:
    manifests = render(BASE)
    assert the(manifests, "StatefulSet", "gateway")["spec"]["replicas"] >= 2
    assert the(manifests, "PodDisruptionBudget", "gateway")["spec"]["maxUnavailable"] == 1
    syncd = the(manifests, "Deployment", "syncd")
    assert syncd["spec"]["replicas"] == 1
    assert syncd["spec"]["strategy"] == {"type": "Recreate"}


def test_syncd_knows_every_gateway_and_may_ask_it() -> None:
    manifests = render(BASE)
    gateway = the(manifests, "StatefulSet", "gateway")
    config = yaml.safe_load(the(manifests, "ConfigMap", "syncd-config")["data"]["syncd.yaml"])
    _, plugin, _ = gateway_pod(manifests)
    service_name, port = gateway["spec"]["serviceName"], ports(plugin)["plugin-api"]
    names = [f"gateway-{number}" for number in range(gateway["spec"]["replicas"])]
    assert [(g["name"], g["url"]) for g in config["gateways"]] == [
        (name, f"http://{name}.{service_name}:{port}") for name in names
    ]
    (syncd,) = pod_spec(the(manifests, "Deployment", "syncd"))["containers"]
    tokens = [entry["name"] for entry in syncd["env"] if entry["name"].startswith("SYNCD_GATEWAYS__")]
    assert tokens == [f"SYNCD_GATEWAYS__{number}__TOKEN" for number in range(len(names))]
    out = the(manifests, "NetworkPolicy", "syncd")["spec"]["egress"]
    into = the(manifests, "NetworkPolicy", "gateway")["spec"]["ingress"]
    pods = {"podSelector": {"matchLabels": {"app.kubernetes.io/name": "gateway"}}}
    assert {"to": [pods], "ports": [{"port": "plugin-api"}]} in out
    pods = {"podSelector": {"matchLabels": {"app.kubernetes.io/name": "syncd"}}}
    assert {"from": [pods], "ports": [{"port": "plugin-api"}]} in into


# Gateways as a Deployment


def test_syncd_beside_a_deployment_is_configured_the_same_but_for_the_gateways() -> None:
    here = render(KUBERNETES / "overlays" / "deployment")

    def settings(manifests: list[Manifest]) -> Manifest:
        text = the(manifests, "ConfigMap", "syncd-config")["data"]["syncd.yaml"]
        found: Manifest = yaml.safe_load(text)
        return found

    assert settings(here) == {k: v for k, v in settings(render(BASE)).items() if k != "gateways"}
    (syncd,) = pod_spec(the(here, "Deployment", "syncd"))["containers"]
    assert not [entry["name"] for entry in syncd["env"] if "GATEWAYS" in entry["name"]]


def test_the_deployment_differs_in_the_spool_and_in_how_it_ends() -> None:
    manifests = render(KUBERNETES / "overlays" / "deployment")
    deployment = the(manifests, "Deployment", "gateway")
    spec, plugin, _ = gateway_pod(manifests)
    (spool,) = (v for v in spec["volumes"] if v["name"] == "spool")
    assert "emptyDir" in spool
    assert deployment["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
    assert spec["terminationGracePeriodSeconds"] >= 300
    assert "preStop" in plugin["lifecycle"]


def test_the_drain_hook_watches_the_port_where_kong_tells_its_status() -> None:
    _, plugin, kong = gateway_pod(render(KUBERNETES / "overlays" / "deployment"))
    python, script, port = plugin["lifecycle"]["preStop"]["exec"]["command"]
    assert python == "python"
    assert mounts(plugin)[str(Path(script).parent)]["name"] == "drain-hook"
    assert int(port) == ports(kong)["status"]
    assert values(kong)["KONG_STATUS_LISTEN"].endswith(f":{port}")


# Secrets


def secrets_used(manifests: list[Manifest]) -> set[tuple[str, str]]:
    """Name and key of each secret that a pod or a monitor takes something from."""
    used = set()
    for workload in workloads(manifests):
        for container in containers(pod_spec(workload)):
            for entry in container.get("env", ()):
                if "secretKeyRef" in entry.get("valueFrom", {}):
                    reference = entry["valueFrom"]["secretKeyRef"]
                    used.add((reference["name"], reference["key"]))
        for volume in pod_spec(workload)["volumes"]:
            if "secret" in volume:
                used |= {(volume["secret"]["secretName"], item["key"]) for item in volume["secret"]["items"]}
    for monitor in manifests:
        if monitor["kind"] == "PodMonitor":
            for endpoint in monitor["spec"]["podMetricsEndpoints"]:
                credentials = endpoint["authorization"]["credentials"]
                used.add((credentials["name"], credentials["key"]))
    return used


def test_the_secret_that_the_page_has_you_make_is_the_one_that_is_used() -> None:
    page = (ROOT / "docs" / "deployment.md").read_text()
    command = re.search(r"kubectl --namespace (\S+) create secret generic (\S+)(.*?)\n```", page, re.DOTALL)
    assert command is not None
    made = {(command[2], key) for key in re.findall(r"--from-literal=([a-z-]+)=", command[3])}
    assert made == {used for make in WHOLES.values() for used in secrets_used(make())}
    assert command[1] == yaml.safe_load((BASE / "kustomization.yaml").read_text())["namespace"]


def test_no_secret_stands_in_a_manifest() -> None:
    assert [m for make in WHOLES.values() for m in make() if m["kind"] == "Secret"] == []
    for make in WHOLES.values():
        for workload in workloads(make()):
            for container in containers(pod_spec(workload)):
                given = [entry["name"] for entry in container.get("env", ()) if "value" in entry]
                assert not [name for name in given if "TOKEN" in name]


def test_the_token_in_kong_yml_is_the_variable_that_kong_gets() -> None:
    document = yaml.safe_load(the(render(BASE), "ConfigMap", "kong-config")["data"]["kong.yml"])
    (entry,) = document["plugins"]
    reference = re.fullmatch(r"\{vault://env/([a-z-]+)\}", entry["config"]["api_token"])
    assert reference is not None
    _, _, kong = gateway_pod(render(BASE))
    assert reference[1].upper().replace("-", "_") in {e["name"] for e in kong["env"] if "valueFrom" in e}
