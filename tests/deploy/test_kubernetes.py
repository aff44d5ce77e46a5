"""What the chart's objects promise, as far as it can be seen without a cluster."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from openmeter_plugin import __version__
from syncd.config.settings import load
from tests.deploy.files import ROOT, service
from tests.deploy.helm import (
    CHART,
    FIRST,
    RELEASE,
    VALUES,
    Manifest,
    RefusedError,
    containers,
    pod_spec,
    render,
    rendered_with,
    text,
    the,
)
from tests.deploy.tools import needs, tool

Whole = Callable[[], list[Manifest]]
SEVERAL = {"secret": {"existing": "tokens"}, "syncd": {"replicas": 3, "stateUrl": {"secret": "postgres"}}}
WHOLES: dict[str, Whole] = {
    "default": render,
    "kong-admin": lambda: render("kong-admin"),
    "dashboard": lambda: render("kong-admin", "dashboard"),
    "gateways": lambda: render("gateways"),
    "gateways-with-everything": lambda: render("gateways", "monitoring", "strict", "dashboard"),
    "without-volumes": lambda: render("gateways", "without-volumes"),
    "drain": lambda: render("gateways", "drain"),
    "several-syncd": lambda: rendered_with(SEVERAL, "kong-admin"),
}
GATEWAYS = "gateways"
DRAIN = "drain-spool-metering-gateway-2"
LATEST = kubernetes_validate.latest_version()
"""The last version of Kubernetes whose schemas are there."""
SCHEMAS = Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema"
CRDS = ROOT / ".tools" / "prometheus-operator"
"""The definitions of the Prometheus operator's objects, which `make tools` takes from its Go module."""
OPERATORS = "monitoring.coreos.com"

pytestmark = [needs("helm"), pytest.mark.slow]
wholes = pytest.mark.parametrize("whole", [pytest.param(make, id=name) for name, make in WHOLES.items()])


def workloads(manifests: list[Manifest]) -> list[Manifest]:
    return [m for m in manifests if "template" in m.get("spec", {})]


def name_of(manifest: Manifest) -> str:
    found: str = manifest["metadata"]["name"].removeprefix(f"{RELEASE}-")
    return found


def gateway_pod(manifests: list[Manifest]) -> tuple[Manifest, Manifest, Manifest]:
    """The pod's spec, the sidecar and Kong."""
    (gateway,) = (m for m in workloads(manifests) if name_of(m) == "gateway")
    spec = pod_spec(gateway)
    (plugin,), (kong,) = spec["initContainers"], spec["containers"]
    return spec, plugin, kong


def mounts(container: Manifest) -> dict[str, Manifest]:
    return {mount["mountPath"]: mount for mount in container["volumeMounts"]}


def ports(container: Manifest) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for port in container.get("ports", ())}


def values(container: Manifest) -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in container["env"] if "value" in entry}


# The chart


def test_helm_finds_no_fault_in_the_chart() -> None:
    command = [str(tool("helm")), "lint", "--strict", "--kube-version", FIRST, str(CHART)]
    done = subprocess.run([*command, "--set", "secret.existing=tokens"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_example_of_values_is_rendered_here() -> None:
    (rendered,) = re.findall(r"^WHOLES.*?^}", Path(__file__).read_text(), re.MULTILINE | re.DOTALL)
    assert {path.stem for path in VALUES.iterdir()} <= set(re.findall(r'"([a-z-]+)"', rendered))


@pytest.fixture(scope="module")
def schemas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The schemas that kubernetes-validate brings along, with references that kubeconform can follow."""
    folder = tmp_path_factory.mktemp("schemas")
    objects = [manifest for make in WHOLES.values() for manifest in make()]
    kubernetes = [one for one in objects if not one["apiVersion"].startswith(OPERATORS)]
    for version in (FIRST, LATEST):
        (folder / version).mkdir()
        for name, schema in schemas_of_operator().items():
            (folder / version / name).write_text(json.dumps(schema))
        names = {"_definitions.json"} | {file_of_schema(one["apiVersion"], one["kind"]) for one in kubernetes}
        for name in names:
            schema = json.loads((SCHEMAS / f"v{version}-local-strict" / name).read_text())
            del schema["$id"]  # the address that references are relative to
            here = json.dumps(schema).replace('"/api/_definitions.json', '"_definitions.json')
            (folder / version / name).write_text(here)
    return folder


def schemas_of_operator() -> dict[str, Any]:
    """The schemas of the Prometheus operator's objects by file; none where its definitions are not there."""
    found: dict[str, Any] = {}
    for path in CRDS.glob("*.yaml"):
        spec = yaml.safe_load(path.read_text())["spec"]
        for version in spec["versions"]:
            name = file_of_schema(f"{spec['group']}/{version['name']}", spec["names"]["kind"])
            found[name] = strict(version["schema"]["openAPIV3Schema"])
    return found


def strict(schema: Any) -> Any:
    """A schema whose objects may have no other fields than those it names."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: strict(value) for name, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        closed.setdefault("additionalProperties", False)
    return closed


def file_of_schema(api: str, kind: str) -> str:
    """The file with the schema of an object, as kubeconform names it."""
    group, _, version = api.rpartition("/")
    parts = [kind.lower(), *([group.partition(".")[0]] if group else []), version]
    return "-".join(parts) + ".json"


def conforms(manifests: str, schemas: Path, version: str) -> subprocess.CompletedProcess[str]:
    """Have kubeconform judge objects."""
    where = f"{schemas}/{version}/{{{{ .ResourceKind }}}}{{{{ .KindSuffix }}}}.json"
    command = [str(tool("kubeconform")), "-strict", "-summary", "-schema-location", where]
    if not CRDS.exists():
        command += ["-skip", "PodMonitor,ServiceMonitor,PrometheusRule"]
    return subprocess.run(command, input=manifests, capture_output=True, text=True)


@needs("kubeconform")
@wholes
@pytest.mark.parametrize("version", [FIRST, LATEST])
def test_every_object_is_what_the_schema_of_kubernetes_allows(
    whole: Whole, version: str, schemas: Path
) -> None:
    done = conforms(yaml.safe_dump_all(whole()), schemas, version)
    assert done.returncode == 0, done.stdout
    assert "Invalid: 0, Errors: 0" in done.stdout
    assert "Valid: 0" not in done.stdout


@needs("kubeconform")
def test_a_misspelt_field_would_have_been_found(schemas: Path) -> None:
    broken = the(render(GATEWAYS), "StatefulSet", "gateway")
    pod_spec(broken)["initContainers"][0]["restartPolicies"] = "Always"
    done = conforms(yaml.safe_dump(broken), schemas, LATEST)
    assert (done.returncode, "restartPolicies" in done.stdout) == (1, True), done.stdout


@needs("kubeconform")
@pytest.mark.skipif(not CRDS.exists(), reason="needs the Prometheus operator's definitions: run make tools")
@pytest.mark.parametrize("kind", ["PodMonitor", "ServiceMonitor", "PrometheusRule"])
def test_a_misspelt_field_of_the_prometheus_operator_would_have_been_found(kind: str, schemas: Path) -> None:
    broken = next(one for one in render(GATEWAYS, "monitoring") if one["kind"] == kind)
    assert conforms(yaml.safe_dump(broken), schemas, LATEST).returncode == 0
    broken["spec"]["selektor"] = {}
    done = conforms(yaml.safe_dump(broken), schemas, LATEST)
    assert (done.returncode, "selektor" in done.stdout) == (1, True), done.stdout


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({}, "secret.meteringToken: the metering API's token is missing"),
        ({"secret": {"existing": "x"}, "syncd": {"replicas": 2}}, "syncd.replicas: more than one needs"),
        ({"secret": {"existing": "x"}, "syncd": {"ingress": {"enabled": True}}}, "syncd.ingress.host"),
        ({"secret": {"existing": "x"}, "sycnd": {}}, "sycnd"),
        ({"secret": {"existing": "x"}, "syncd": {"replicas": 0}}, "/syncd/replicas"),
        ({"secret": {"existing": "x"}, "syncd": {"config": {"metering": {"token": "t"}}}}, "/metering"),
        ({"secret": {"existing": "x"}, "gateway": {"kind": "DaemonSet"}}, "/gateway/kind"),
        ({"secret": {"existing": "x", "syncdToken": "short"}}, "/secret/syncdToken"),
        ({"secret": {"existing": "x"}, "drain": {"claims": "spool"}}, "/drain/claims"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_values_that_cannot_work_are_refused_by_name(values: dict[str, Any], named: str) -> None:
    with pytest.raises(RefusedError) as refused:
        text(values)
    assert named in str(refused.value)


def test_our_images_and_the_chart_have_the_version_of_the_project() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert (chart["version"], chart["appVersion"]) == (__version__, __version__)
    images = {
        container["image"]
        for make in WHOLES.values()
        for workload in workloads(make())
        for container in containers(pod_spec(workload))
    }
    ours = {image for image in images if image.startswith("kong-openmeter/")}
    assert ours == {f"kong-openmeter/plugin:{__version__}", f"kong-openmeter/syncd:{__version__}"}
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
                wanted -= {("PersistentVolumeClaim", "spool-metering-gateway-2")}
            assert wanted <= there, wanted - there


def test_the_job_drains_a_claim_of_the_gateways() -> None:
    stateful_set = the(render(GATEWAYS), "StatefulSet", "gateway")
    (claim,) = stateful_set["spec"]["volumeClaimTemplates"]
    job = the(render(GATEWAYS, "drain"), "Job", DRAIN)
    (volume,) = (v for v in pod_spec(job)["volumes"] if "persistentVolumeClaim" in v)
    replicas = stateful_set["spec"]["replicas"]
    left_behind = f"{claim['metadata']['name']}-{stateful_set['metadata']['name']}-{replicas}"
    assert volume["persistentVolumeClaim"]["claimName"] == left_behind
    (container,) = pod_spec(job)["containers"]
    _, plugin, _ = gateway_pod(render(GATEWAYS))
    where = {path for path, mount in mounts(plugin).items() if mount["name"] == claim["metadata"]["name"]}
    assert where == {path for path, mount in mounts(container).items() if mount["name"] == volume["name"]}
    assert container["args"][-1] in {f"{path}/spool" for path in where}


@wholes
def test_probes_services_and_policies_name_ports_that_exist(whole: Whole) -> None:
    manifests = whole()
    by_name: dict[str, dict[str, int]] = {}
    for workload in workloads(manifests):
        everything = [ports(container) for container in containers(pod_spec(workload))]
        by_name[workload["metadata"]["labels"]["app.kubernetes.io/name"]] = {
            k: v for found in everything for k, v in found.items()
        }
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
        elif manifest["kind"] == "ServiceMonitor":
            served = {port["name"] for port in the(manifests, "Service", name)["spec"]["ports"]}
            assert {e["port"] for e in manifest["spec"]["endpoints"]} <= served


@wholes
def test_every_selector_finds_the_pods_that_it_is_meant_for(whole: Whole) -> None:
    manifests = whole()
    labels = [m["spec"]["template"]["metadata"]["labels"] for m in workloads(manifests)]
    labels += [m["metadata"]["labels"] for m in manifests if m["kind"] == "Service"]
    for manifest in manifests:
        spec = manifest.get("spec", {})
        selector = spec.get("podSelector", spec.get("selector"))
        if selector is None:
            continue
        wanted = selector.get("matchLabels", selector)
        assert any(wanted.items() <= found.items() for found in labels), manifest["metadata"]["name"]


def test_the_job_that_drains_is_let_out() -> None:
    manifests = render(GATEWAYS, "drain")
    wanted = the(manifests, "NetworkPolicy", "drain")["spec"]["podSelector"]["matchLabels"]
    assert wanted.items() <= the(manifests, "Job", DRAIN)["spec"]["template"]["metadata"]["labels"].items()


def test_the_stateful_set_has_its_headless_service() -> None:
    manifests = render(GATEWAYS)
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
    _, plugin, kong = gateway_pod(render(GATEWAYS))
    user = re.search(r"USER (\d+):(\d+)", (ROOT / "plugin" / "Dockerfile").read_text())
    assert user is not None
    ours = plugin["securityContext"]
    assert [ours["runAsUser"], ours["runAsGroup"]] == [int(number) for number in user.groups()]
    assert kong["securityContext"]["runAsUser"] != ours["runAsUser"]


# The gateway


def test_kong_starts_only_when_the_plugin_server_listens_and_the_info_is_there() -> None:
    _, plugin, _ = gateway_pod(render(GATEWAYS))
    assert plugin["restartPolicy"] == "Always"
    healthcheck: list[str] = service("plugin")["healthcheck"]["test"]
    assert ["CMD", *plugin["startupProbe"]["exec"]["command"]] == healthcheck


def test_kong_is_told_what_compose_tells_it() -> None:
    _, _, kong = gateway_pod(render(GATEWAYS))
    here, there = values(kong), service("kong")["environment"]
    own = {"KONG_DECLARATIVE_CONFIG", "KONG_PREFIX", "KONG_STATUS_LISTEN", "KONG_NGINX_WORKER_PROCESSES"}
    assert {name for name in here if name not in there} <= own
    same = {name for name in here if name in there} - own
    assert {"KONG_PLUGINSERVER_OPENMETER_SOCKET", "KONG_PLUGINSERVER_OPENMETER_QUERY_CMD"} <= same
    assert {name: here[name] for name in same} == {name: there[name] for name in same}


def test_kong_and_the_plugin_server_share_the_folder_of_the_socket_and_nothing_else() -> None:
    _, plugin, kong = gateway_pod(render(GATEWAYS))
    folder = str(Path(values(kong)["KONG_PLUGINSERVER_OPENMETER_SOCKET"]).parent)
    assert mounts(kong)[folder]["name"] == mounts(plugin)[folder]["name"]
    assert mounts(kong)[folder]["readOnly"] is True
    shared = {m["name"] for m in kong["volumeMounts"]} & {m["name"] for m in plugin["volumeMounts"]}
    assert shared == {mounts(kong)[folder]["name"]}
    dockerfile = (ROOT / "plugin" / "Dockerfile").read_text()
    assert f"OPENMETER_PLUGIN_RUN={folder}" in dockerfile


def test_kong_may_write_where_it_must() -> None:
    _, _, kong = gateway_pod(render(GATEWAYS))
    assert "readOnly" not in mounts(kong)[values(kong)["KONG_PREFIX"]]
    declarative = Path(values(kong)["KONG_DECLARATIVE_CONFIG"])
    assert mounts(kong)[str(declarative.parent)]["name"] == "kong-config"
    assert declarative.name in the(render(GATEWAYS), "ConfigMap", "kong")["data"]


def test_the_spool_is_on_a_volume_that_outlives_pod_and_set() -> None:
    gateway = the(render(GATEWAYS), "StatefulSet", "gateway")
    _, plugin, _ = gateway_pod(render(GATEWAYS))
    spool = re.search(r"OPENMETER_PLUGIN_SPOOL=(\S+)", (ROOT / "plugin" / "Dockerfile").read_text())
    assert spool is not None
    (claim,) = gateway["spec"]["volumeClaimTemplates"]
    (where,) = (path for path in mounts(plugin) if spool[1].startswith(f"{path}/"))
    assert mounts(plugin)[where]["name"] == claim["metadata"]["name"]
    kept = gateway["spec"]["persistentVolumeClaimRetentionPolicy"]
    assert kept == {"whenDeleted": "Retain", "whenScaled": "Retain"}


def test_the_pod_has_time_for_kong_and_then_for_the_plugin_server() -> None:
    spec, _, kong = gateway_pod(render(GATEWAYS))
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
    _, plugin, _ = gateway_pod(render(GATEWAYS))
    assert "readinessProbe" not in plugin
    _, plugin, _ = gateway_pod(render(GATEWAYS, "strict"))
    assert plugin["readinessProbe"]["httpGet"]["path"] == "/readyz"


def test_there_is_always_a_gateway_and_only_ever_one_syncd() -> None:
    manifests = render(GATEWAYS)
    assert the(manifests, "StatefulSet", "gateway")["spec"]["replicas"] >= 2
    assert the(manifests, "PodDisruptionBudget", "gateway")["spec"]["maxUnavailable"] == 1
    syncd = the(manifests, "Deployment", "syncd")
    assert syncd["spec"]["replicas"] == 1
    assert syncd["spec"]["strategy"] == {"type": "Recreate"}


def test_syncd_knows_every_gateway_and_may_ask_it() -> None:
    manifests = render(GATEWAYS)
    gateway = the(manifests, "StatefulSet", "gateway")
    config = yaml.safe_load(the(manifests, "ConfigMap", "syncd")["data"]["syncd.yaml"])
    _, plugin, _ = gateway_pod(manifests)
    service_name, port = gateway["spec"]["serviceName"], ports(plugin)["plugin-api"]
    names = [f"gateway-{number}" for number in range(gateway["spec"]["replicas"])]
    assert [(g["name"], g["url"]) for g in config["gateways"]] == [
        (name, f"http://{RELEASE}-{name}.{service_name}:{port}") for name in names
    ]
    (syncd,) = pod_spec(the(manifests, "Deployment", "syncd"))["containers"]
    tokens = [entry["name"] for entry in syncd["env"] if entry["name"].startswith("SYNCD_GATEWAYS__")]
    assert tokens == [f"SYNCD_GATEWAYS__{number}__TOKEN" for number in range(len(names))]
    out = the(manifests, "NetworkPolicy", "syncd")["spec"]["egress"]
    into = the(manifests, "NetworkPolicy", "gateway")["spec"]["ingress"]
    assert {"ports": [{"port": port}]} in out  # gateways may be of another release
    labels = {"app.kubernetes.io/name": "syncd", "app.kubernetes.io/instance": RELEASE}
    pods = {"podSelector": {"matchLabels": labels}}
    assert {"from": [pods], "ports": [{"port": "plugin-api"}]} in into


# Gateways as a Deployment


def test_syncd_beside_a_deployment_is_configured_the_same_but_for_the_gateways() -> None:
    here = render(GATEWAYS, "without-volumes")

    def settings(manifests: list[Manifest]) -> Manifest:
        found: Manifest = yaml.safe_load(the(manifests, "ConfigMap", "syncd")["data"]["syncd.yaml"])
        return found

    assert settings(here) == settings(render(GATEWAYS)) | {"gateways": []}
    (syncd,) = pod_spec(the(here, "Deployment", "syncd"))["containers"]
    assert not [entry["name"] for entry in syncd["env"] if "GATEWAYS" in entry["name"]]


def test_the_deployment_differs_in_the_spool_and_in_how_it_ends() -> None:
    manifests = render(GATEWAYS, "without-volumes")
    deployment = the(manifests, "Deployment", "gateway")
    spec, plugin, _ = gateway_pod(manifests)
    (spool,) = (v for v in spec["volumes"] if v["name"] == "spool")
    assert "emptyDir" in spool
    assert deployment["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
    assert spec["terminationGracePeriodSeconds"] >= 300
    assert "preStop" in plugin["lifecycle"]


def test_the_hook_watches_the_port_where_kong_tells_its_status() -> None:
    _, plugin, kong = gateway_pod(render(GATEWAYS, "without-volumes"))
    *command, port = plugin["lifecycle"]["preStop"]["exec"]["command"]
    assert command == ["openmeter-plugin", "spool", "wait"]
    assert port == f"--kong-port={ports(kong)['status']}"
    assert values(kong)["KONG_STATUS_LISTEN"].endswith(f":{ports(kong)['status']}")


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
        spec = monitor.get("spec", {})
        for endpoint in [*spec.get("podMetricsEndpoints", ()), *spec.get("endpoints", ())]:
            credentials = endpoint["authorization"]["credentials"]
            used.add((credentials["name"], credentials["key"]))
    return used


def test_the_secret_has_the_keys_that_are_used_wherever_it_comes_from() -> None:
    made = the(render(GATEWAYS), "Secret", "tokens")
    used = secrets_used(render(GATEWAYS, "drain", "monitoring"))
    assert used == {(f"{RELEASE}-tokens", key) for key in made["stringData"]}
    own = render(GATEWAYS, "drain", "monitoring", "dashboard")
    assert [m for m in own if m["kind"] == "Secret"] == []
    page = (ROOT / "docs" / "quickstart-helm.md").read_text()
    command = re.search(r"kubectl --namespace \S+ create secret generic (\S+)(.*?)\n```", page, re.DOTALL)
    assert command is not None
    assert secrets_used(own) == {
        (command[1], key) for key in re.findall(r"--from-literal=([a-z-]+)=", command[2])
    }


def test_no_token_stands_anywhere_but_in_the_secret() -> None:
    for manifest in render(GATEWAYS, "drain", "monitoring"):
        if manifest["kind"] != "Secret":
            assert "-of-a-test" not in yaml.safe_dump(manifest)


def test_the_token_in_kong_yml_is_the_variable_that_kong_gets() -> None:
    document = yaml.safe_load(the(render(GATEWAYS), "ConfigMap", "kong")["data"]["kong.yml"])
    (entry,) = document["plugins"]
    reference = re.fullmatch(r"\{vault://env/([a-z-]+)\}", entry["config"]["api_token"])
    assert reference is not None
    _, _, kong = gateway_pod(render(GATEWAYS))
    assert reference[1].upper().replace("-", "_") in {e["name"] for e in kong["env"] if "valueFrom" in e}


def test_the_dashboard_can_be_reached_while_syncd_is_not_ready() -> None:
    assert the(render(), "Service", "syncd")["spec"]["publishNotReadyAddresses"] is True


@pytest.mark.parametrize(
    ("values", "selected"),
    [({}, []), ({"gatewayPods": {"app": "kong"}}, [{"app": "kong"}])],
    ids=["none", "of another release"],
)
def test_gateways_that_the_chart_does_not_run_are_scraped_where_they_are_named(
    values: dict[str, Any], selected: list[Manifest]
) -> None:
    monitoring = {"secret": {"existing": "x"}, "monitoring": {"monitors": {"enabled": True}, **values}}
    manifests = rendered_with(monitoring, "kong-admin")
    monitors = [m for m in manifests if m["kind"] == "PodMonitor"]
    assert [m["spec"]["selector"]["matchLabels"] for m in monitors] == selected
    assert the(manifests, "ServiceMonitor", "syncd")


# More than one syncd


def test_several_syncd_share_a_database_and_no_volume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifests = rendered_with(SEVERAL, "kong-admin")
    syncd = the(manifests, "Deployment", "syncd")
    assert "strategy" not in syncd["spec"]
    (container,) = pod_spec(syncd)["containers"]
    (url,) = (entry for entry in container["env"] if entry["name"] == "SYNCD_DAEMON__STATE_URL")
    assert url["valueFrom"]["secretKeyRef"] == {"name": "postgres", "key": "state-url"}
    monkeypatch.setenv(url["name"], "postgresql://syncd@postgres/syncd")
    for name in ("SYNCD_METERING__TOKEN", "SYNCD_DAEMON__TOKEN"):
        monkeypatch.setenv(name, "token-of-the-secret")
    (tmp_path / "syncd.yaml").write_text(the(manifests, "ConfigMap", "syncd")["data"]["syncd.yaml"])
    state = load(tmp_path / "syncd.yaml").daemon.state_url
    assert state is not None
    assert state.get_secret_value().endswith("syncd@postgres/syncd")
    assert [m for m in manifests if m["kind"] == "PersistentVolumeClaim"] == []
    assert the(manifests, "PodDisruptionBudget", "syncd")["spec"]["maxUnavailable"] == 1
