"""Settings file of the http-log input: openmeter-plugin.yaml.

It holds the plugin's own keys, as under `config` in Kong, and `http_log` for the receiver itself. Kong does
not check this file against its schema, so an unknown key is an error here: ignored silently, it would make a
wrong bill.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final

import orjson
import yaml
from pydantic import BaseModel, ByteSize, ConfigDict, Field, SecretStr, ValidationError, field_validator

from openmeter_plugin.config.instance_config import ConfigError, describe_errors, parse_config
from openmeter_plugin.config.schema import FIELDS
from openmeter_plugin.log import get_logger

TOKEN_VARIABLE: Final = "OPENMETER_PLUGIN_API_TOKEN"  # noqa: S105 - a name
SECRET_VARIABLE: Final = "OPENMETER_PLUGIN_HTTP_LOG_SECRET"  # noqa: S105 - a name

CREDENTIAL: Final = "openmeter-plugin.yaml"
"""Stands for the token in the destination's id: the file, wherever it is stored, and never the token."""

_HEADER_NAME: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_RESERVED_HEADERS: Final = frozenset(
    {"host", "content-length", "content-type", "content-encoding", "connection"}
)
_MIN_SECRET_LENGTH: Final = 16
_VAULT_PREFIX: Final = "{vault://"


class HttpLogSettings(BaseModel):
    """The receiver's settings. Times are in seconds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    secret: tuple[SecretStr, ...] = ()
    header: str = "x-metering-key"
    max_body: Annotated[ByteSize, Field(ge=64 * 1024, le=64 * 1024 * 1024)] = ByteSize(16 * 1024 * 1024)
    max_connections: Annotated[int, Field(ge=1, le=10_000)] = 256
    read_timeout: Annotated[float, Field(gt=0, le=300)] = 10.0
    write_timeout: Annotated[float, Field(gt=0, le=300)] = 5.0

    @field_validator("secret", mode="before")
    @classmethod
    def _to_sequence(cls, value: Any) -> Any:
        return value if isinstance(value, (list, tuple)) else (value,)

    @field_validator("secret")
    @classmethod
    def _check_secrets(cls, value: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        if not value:
            raise ValueError("must have at least one; to use none, remove the setting")
        for secret in value:
            text = secret.get_secret_value()
            if text.startswith(_VAULT_PREFIX):
                raise ValueError(f"a vault reference is resolved by Kong only; use {SECRET_VARIABLE}")
            if not (text.isascii() and text.isprintable()) or " " in text:
                raise ValueError("must be printable ASCII without spaces, to be sent in a header")
            if len(text) < _MIN_SECRET_LENGTH:
                raise ValueError(f"must have at least {_MIN_SECRET_LENGTH} characters")
        return value

    @field_validator("header")
    @classmethod
    def _check_header(cls, value: str) -> str:
        name = value.lower()
        if not _HEADER_NAME.fullmatch(name) or name in _RESERVED_HEADERS:
            raise ValueError("must be the name of a header that http-log may set, such as x-metering-key")
        return name


@dataclass(frozen=True, slots=True)
class HttpLogConfig:
    """The receiver's settings, and the plugin's configuration as Kong would pass it."""

    settings: HttpLogSettings
    plugin: bytes = field(repr=False)


def load(path: Path, environment: Mapping[str, str] = os.environ) -> HttpLogConfig:
    """Read and check the file; raises ConfigError that names the file and each wrong field."""
    try:
        return _checked(_parsed(path), environment)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _checked(raw: dict[str, Any], environment: Mapping[str, str]) -> HttpLogConfig:
    http_log = raw.pop("http_log", None)
    http_log = {} if http_log is None else http_log
    if not isinstance(http_log, dict):
        raise ConfigError("http_log: must be a mapping")
    token = environment.get(TOKEN_VARIABLE, "").strip()
    if token:
        raw["api_token"] = token
    if SECRET_VARIABLE in environment:
        # A variable that is set but empty is a lost secret; it must not open the receiver to everyone.
        http_log = http_log | {"secret": environment[SECRET_VARIABLE].split() or ""}
    unknown = list(_unknown(raw, FIELDS))
    if unknown:
        raise ConfigError("; ".join(f"{name}: there is no such setting" for name in unknown))
    if str(raw.get("api_token", "")).startswith(_VAULT_PREFIX):
        raise ConfigError(f"api_token: a vault reference is resolved by Kong only; use {TOKEN_VARIABLE}")
    try:
        orjson.dumps(raw)
    except TypeError:  # bytes, sets, a list that contains itself
        raise ConfigError("may contain only texts, numbers, lists and mappings") from None
    parse_config(raw)
    try:
        settings = HttpLogSettings.model_validate(http_log)
    except ValidationError as error:
        raise ConfigError(describe_errors(error, "http_log")) from None
    return HttpLogConfig(settings, orjson.dumps(raw | {"__plugin_id": CREDENTIAL}))


def _parsed(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            raw = yaml.load(file, Loader=_Loader)  # noqa: S506 - plain values only, as SafeLoader
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}") from None
    except RecursionError:
        raise ConfigError("is nested too deeply") from None
    except yaml.YAMLError as error:
        # Not the error's own text: it quotes the line, which may hold the token.
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"is not YAML{where}") from None
    if not isinstance(raw, dict):
        raise ConfigError("must be a mapping of settings such as ingest_endpoint")
    if mode & (stat.S_IRWXG | stat.S_IRWXO) and ("api_token" in raw or "http_log" in raw):
        get_logger().warning("configuration_readable_by_others", file=path.name, remedy="chmod 600")
    return raw


class _Loader(yaml.SafeLoader):
    """Refuses duplicate settings: one of the two values would be ignored silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Return the mapping; raises ConfigError."""
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise ConfigError(
                    f"{key.value}: is set twice, the second time in line {key.start_mark.line + 1}"
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _unknown(config: Mapping[Any, Any], fields: list[dict[str, Any]], within: str = "") -> Iterator[str]:
    """Yield the keys that the plugin's schema does not have."""
    known = {name: definition for entry in fields for name, definition in entry.items()}
    for key, value in config.items():
        definition = known.get(key)
        if definition is None:
            yield f"{within}{key}"
            continue
        if definition["type"] == "record" and isinstance(value, dict):
            yield from _unknown(value, definition["fields"], f"{within}{key}.")
        elements = definition.get("elements", {})
        if elements.get("type") == "record" and isinstance(value, list):
            for number, element in enumerate(value):
                if isinstance(element, dict):
                    yield from _unknown(element, elements["fields"], f"{within}{key}.{number}.")
