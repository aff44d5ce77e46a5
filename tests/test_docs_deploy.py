"""What the documentation has one type to Docker and kubectl names things that are there.

Neither program is here, so the words are held against the compose file, the manifests and kong.yml, and the
options against those that the two have.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import Any, Final

import pytest
import yaml

from tests.deploy.helm import render
from tests.deploy.tools import needs
from tests.documents import PAGES, ROOT, blocks, prose

COMPOSE: Final[dict[str, Any]] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
KONG: Final[dict[str, Any]] = yaml.safe_load((ROOT / "kong.yml").read_text())

COMPOSE_OPTIONS: Final = {
    "": {"--profile"},
    "up": {"--build", "--wait", "--scale"},
    "down": {"--volumes"},
    "exec": set[str](),
}
NAMESPACE: Final = "kong-openmeter"
KUBECTL_OPTIONS: Final = {
    "": {"--namespace"},
    "create": {"--from-file", "--from-literal"},
    "label": set[str](),
    "delete": set[str](),
    "exec": {"--container"},
    "get": set[str](),
    "logs": set[str](),
    "port-forward": set[str](),
    "wait": {"--for", "--timeout"},
}
"""Options of each command that the documentation uses, as docs.docker.com and kubernetes.io have them."""


def typed(program: str) -> list[list[str]]:
    """Return the words behind a program wherever the documentation has one type it."""
    lines = [
        line
        for page in PAGES
        for block in blocks(page)
        if block.kind in {"sh", "console"}
        for line in block.text.replace("\\\n", " ").splitlines()
    ]
    lines += [code for page in PAGES for code in re.findall(r"`([^`]+)`", prose(ROOT / page))]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith(f"{program} ")]


DOCKER = [words[1:] for words in typed("docker") if words[0] == "compose"]
KUBECTL = [words for words in typed("kubectl") if len(words) > 2]


def split(words: list[str], options: dict[str, set[str]]) -> tuple[str, list[str], dict[str, list[str]]]:
    """Return command, operands and options with their values; fails at an option that is not among these."""
    command = next(word for word in words if word in options)
    allowed = options[""] | options[command]
    flags = {"--build", "--volumes", "--wait"}
    operands: list[str] = []
    values: dict[str, list[str]] = {}
    rest = iter(words)
    for word in rest:
        if word == "--" or (command == "exec" and program_of(operands)):
            operands += [word, *rest]
        elif word.startswith("-"):
            name, given, value = word.partition("=")
            assert name in allowed, f"{command}: {name}"
            values.setdefault(name, []).append(value if given else "" if name in flags else next(rest))
        else:
            operands.append(word)
    return command, operands, values


def program_of(operands: list[str]) -> bool:
    """Say whether a line of `docker compose exec` has come to the program that it starts."""
    return operands[:1] == ["exec"] and len(operands) > 2


# Docker Compose


@pytest.mark.parametrize("words", DOCKER, ids=" ".join)
def test_docker_compose_is_told_of_services_and_profiles_that_exist(words: list[str]) -> None:
    command, operands, values = split(words, COMPOSE_OPTIONS)
    profiles = {
        profile for service in COMPOSE["services"].values() for profile in service.get("profiles", ())
    }
    assert set(values.get("--profile", ())) <= profiles
    scaled = {value.partition("=")[0] for value in values.get("--scale", ())}
    named = scaled | ({operands[1]} if command == "exec" else set(operands[1:]))
    assert named <= set(COMPOSE["services"])


def requests() -> Iterator[list[str]]:
    for words in typed("curl"):
        if any(":8000/" in word for word in words):
            yield words


def test_the_request_through_the_gateway_is_one_that_it_serves() -> None:
    asked = list(requests())
    assert len(asked) == 2
    published = {port for port in COMPOSE["services"]["kong"]["ports"] if port.endswith(":8000")}
    assert published
    paths = [path for service in KONG["services"] for route in service["routes"] for path in route["paths"]]
    keys = {c["key"] for who in KONG["consumers"] for c in who.get("keyauth_credentials", ())}
    for words in asked:
        (header,) = (words[at + 1] for at, word in enumerate(words) if word == "-H")
        assert header.partition(": ")[0] == "apikey"
        assert header.partition(": ")[2] in keys
        path = words[-1].partition(":8000")[2]
        assert any(path.startswith(served) for served in paths), path


# Kubernetes


def objects() -> dict[tuple[str, str], dict[str, Any]]:
    """Everything that the documentation has one apply, by kind and name, with what a StatefulSet makes."""
    manifests = render("gateways", "monitoring", "drain")
    found = {(m["kind"].lower(), m["metadata"]["name"]): m for m in manifests}
    (gateways,) = (manifest for (kind, _), manifest in found.items() if kind == "statefulset")
    name = gateways["metadata"]["name"]
    for ordinal in range(3):
        found["pod", f"{name}-{ordinal}"] = gateways["spec"]["template"]
        for claim in gateways["spec"]["volumeClaimTemplates"]:
            found["persistentvolumeclaim", f"{claim['metadata']['name']}-{name}-{ordinal}"] = claim
    return found


def named(operand: str) -> tuple[str, str]:
    """Return kind and name of an operand such as deploy/syncd; a bare name is a pod's."""
    kind, _, name = operand.rpartition("/")
    return {"": "pod", "deploy": "deployment"}.get(kind, kind), name


@needs("helm")
@pytest.mark.parametrize("words", KUBECTL, ids=" ".join)
def test_kubectl_is_told_of_objects_that_exist(words: list[str]) -> None:
    command, operands, values = split(words, KUBECTL_OPTIONS)
    there = objects()
    assert set(values.get("--namespace", ())) <= {NAMESPACE}
    match command:
        case "exec" | "logs" | "port-forward":
            manifest = there[named(operands[1])]
            spec = manifest["spec"].get("template", manifest)["spec"]
            inside = spec["containers"] + spec.get("initContainers", [])
            assert set(values.get("--container", ())) <= {container["name"] for container in inside}
        case "delete" | "wait":
            assert all(named(operand) in there for operand in operands[1:])
        case "get":
            assert {kind.removesuffix("s") for kind in operands[1:]} <= {kind for kind, _ in there}
        case _:
            assert command in {"create", "label"}


def test_there_is_something_to_check() -> None:
    assert len(DOCKER) > 7
    assert len(KUBECTL) > 8


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        ("compose up --biuld", "--biuld"),
        ("compose exec syncd2 syncd plan", "syncd2"),
        ("compose --profile openmetre up", "openmetre"),
    ],
)
def test_a_mistake_would_be_found(words: str, wrong: str) -> None:
    with pytest.raises(AssertionError, match=wrong):
        test_docker_compose_is_told_of_services_and_profiles_that_exist(words.split()[1:])
