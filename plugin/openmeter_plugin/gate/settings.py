"""Settings file of the gate, validated at start: each wrong field is named.

The subject has the plugin's own settings: a request that is stopped must be the one that is billed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self
from urllib.parse import urlsplit

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)

from openmeter_plugin.config.instance_config import ConfigError, describe_errors
from openmeter_plugin.config.metering_settings import Subject, SubjectPrefixesConfig
from openmeter_plugin.gate.accounts import Policy, Reason
from openmeter_plugin.gate.lines import line, number
from openmeter_plugin.gate.schedule import Pace

TOKEN_VARIABLE: Final = "OPENMETER_GATE_TOKEN"  # noqa: S105 - a name
DEFAULT_SOCKET: Final = Path("/run/openmeter/gate.sock")


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Metering(_Model):
    """The metering API that is asked."""

    url: str
    dialect: Literal["openmeter-v1", "openmeter-v3", "konnect"] = "openmeter-v3"
    token_file: Path | None = None
    timeout: Annotated[float, Field(gt=0, le=60)] = 5.0

    @model_validator(mode="after")
    def _is_url(self) -> Self:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("url must be an http or https URL")
        return self


class Unit(_Model):
    """What of an event a feature counts: the number of events of a type, or the sum of a property."""

    event: Annotated[str, Field(min_length=1)]
    value: str | None = None
    where: dict[str, str] = {}


_UNITS: Final = {
    "requests": Unit(event="kong.api_request"),
    "tokens": Unit(event="kong.llm_request", value="tokens"),
}


class Feature(_Model):
    """A feature of the metering API, and how this node counts its use."""

    key: Annotated[str, Field(pattern="^[a-z0-9]+(?:_[a-z0-9]+)*$", max_length=64)]
    counts: Literal["requests", "tokens", "nothing"] | Unit = "requests"
    reserve: Annotated[float, Field(ge=0)] | None = None
    credit: Annotated[str, Field(pattern="^[A-Z]{3}$")] | None = None
    """The currency of the prepaid balance that this feature represents, instead of an entitlement."""

    @property
    def unit(self) -> Unit | None:
        """What is counted, None for nothing."""
        if self.credit is not None or self.counts == "nothing":
            return None
        return _UNITS[self.counts] if isinstance(self.counts, str) else self.counts

    @property
    def cost(self) -> float:
        """What a request adds to Kong's counter: 1 where requests are counted, else what it reserves."""
        if self.reserve is not None:
            return self.reserve
        return 1.0 if self.unit == _UNITS["requests"] else 0.0


class Rule(_Model):
    """Which requests need which features: those of a route, service, consumer or tag, or all."""

    features: Annotated[tuple[str, ...], Field(min_length=1)]
    route: str | None = None
    service: str | None = None
    consumer: str | None = None
    tag: str | None = None

    @model_validator(mode="after")
    def _names_one_place(self) -> Self:
        if len(self.places) > 1:
            raise ValueError("a rule names one of route, service, consumer and tag; add a rule for each")
        return self

    @property
    def places(self) -> list[tuple[str, str]]:
        """The kind and the value of what the rule names."""
        given = (("route", self.route), ("service", self.service), ("consumer", self.consumer))
        return [(kind, value) for kind, value in (*given, ("tag", self.tag)) if value]


class Answer(_Model):
    """What a stopped client gets."""

    status: Annotated[int, Field(ge=400, le=599)]
    message: Annotated[str, Field(min_length=1, max_length=1000)]


_ANSWERS: Final = {
    Reason.USAGE_LIMIT_REACHED: Answer(status=429, message="Usage limit reached"),
    Reason.FEATURE_UNAVAILABLE: Answer(status=403, message="Feature is not available"),
    Reason.FEATURE_NOT_FOUND: Answer(status=403, message="Feature not found"),
    Reason.CUSTOMER_NOT_FOUND: Answer(status=403, message="Customer not found"),
    Reason.NO_CREDIT_AVAILABLE: Answer(status=402, message="No credit available"),
    Reason.STALE: Answer(status=503, message="Access cannot be checked at the moment"),
}


class Settings(_Model):
    """The settings of the gate. Times are in seconds."""

    metering: Metering
    features: Annotated[tuple[Feature, ...], Field(min_length=1)]
    mode: Literal["off", "shadow", "enforce"] = "shadow"
    apply: tuple[Rule, ...] = ()
    """Without rules, every request needs all features."""
    socket: Path = DEFAULT_SOCKET
    socket_mode: Annotated[str, Field(pattern="^0?[0-7]{3}$")] = "0660"
    subject: Subject = Subject()
    subject_prefixes: SubjectPrefixesConfig = SubjectPrefixesConfig()
    meter_anonymous_consumer: bool = False
    unknown_customer: Literal["allow", "deny"] = "allow"
    unseen: Literal["allow", "deny"] = "allow"
    no_subject: Literal["allow", "deny"] = "allow"
    on_stale: Literal["allow", "deny"] = "allow"
    max_stale: Annotated[float, Field(ge=10, le=86_400)] = 300.0
    answers: dict[Reason, Answer] = {}
    headers: bool = True
    counted_after: Annotated[float, Field(ge=0, le=3600)] = 5.0
    reserved_for: Annotated[float, Field(gt=0, le=3600)] = 60.0
    max_calls: Annotated[float, Field(ge=1, le=10_000)] = 200.0
    refresh: Annotated[float, Field(ge=0.5, le=300)] = 1.5
    active_for: Annotated[float, Field(ge=1, le=3600)] = 60.0
    forget_after: Annotated[float, Field(ge=60, le=86_400)] = 3600.0

    @field_validator("subject", "subject_prefixes", mode="before")
    @classmethod
    def _has_known_names(cls, value: Any) -> Any:
        # The plugin's own models ignore what Kong adds to a configuration; nobody adds to this file.
        for part in (value, *(value.get("fallbacks") or ())) if isinstance(value, dict) else ():
            known = Subject.model_fields | SubjectPrefixesConfig.model_fields
            if isinstance(part, dict) and (unknown := part.keys() - known):
                raise ValueError(f"{min(unknown)}: there is no such setting")
        return value

    @model_validator(mode="after")
    def _names_its_features(self) -> Self:
        keys = [feature.key for feature in self.features]
        if len(set(keys)) < len(keys):
            raise ValueError("features: a key is there twice")
        for rule in self.apply:
            if unknown := set(rule.features) - set(keys):
                raise ValueError(f"apply: {min(unknown)} is not one of features")
        if self.forget_after < self.active_for:
            raise ValueError("forget_after must not be less than active_for")
        return self

    @property
    def policy(self) -> Policy:
        """The part that decides."""
        return Policy(
            {feature.key: feature.cost for feature in self.features},
            self.unknown_customer,
            self.on_stale,
            self.max_stale,
            self.reserved_for,
        )

    @property
    def pace(self) -> Pace:
        """The part of the schedule."""
        return Pace(
            max_calls=self.max_calls,
            refresh=self.refresh,
            active_for=self.active_for,
            forget_after=self.forget_after,
        )

    def token(self, environment: Mapping[str, str] = os.environ) -> SecretStr | None:
        """Return the token, read each time so that a renewed one is used; raises OSError."""
        if self.metering.token_file is not None:
            return SecretStr(self.metering.token_file.read_text().strip())
        value = environment.get(TOKEN_VARIABLE, "").strip()
        return SecretStr(value) if value else None

    def lines(self, version: str) -> list[str]:
        """Return the settings for Kong, in the line format of the feed."""
        prefixes = self.subject_prefixes.compiled()
        names: dict[str, str] = {
            "mode": self.mode,
            "unseen": self.unseen,
            "no_subject": self.no_subject,
            "on_stale": self.on_stale,
            "max_stale": number(self.max_stale),
            "headers": _on(self.headers),
            "prefix.consumer": prefixes.consumer,
            "prefix.application": prefixes.application,
            "require_consumer": _on(self.subject.require_consumer),
            "anonymous": _on(self.meter_anonymous_consumer),
            "version": version,
        }
        found = [line("C", name, value) for name, value in names.items()]
        for index, lookup in enumerate(self.subject.lookups, start=1):
            found.append(line("L", str(index), lookup.place, lookup.field))
        found += [line("F", feature.key, number(feature.cost)) for feature in self.features]
        for rule in self.apply or (Rule(features=tuple(feature.key for feature in self.features)),):
            kind, value = rule.places[0] if rule.places else ("all", "*")
            found.append(line("R", kind, value, ",".join(rule.features)))
        for reason in Reason:
            answer = self.answers.get(reason, _ANSWERS[reason])
            found.append(line("W", reason, str(answer.status), answer.message))
        return found


def _on(value: bool) -> str:
    return "on" if value else "off"


def load(path: Path) -> Settings:
    """Read and check the file; raises ConfigError that names the file and each wrong field."""
    try:
        with path.open("rb") as file:
            raw: Any = yaml.safe_load(file)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{path}: is not YAML{where}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: must be a mapping of settings such as features")
    try:
        settings = Settings.model_validate(raw)
        settings.token()
    except ValidationError as error:
        raise ConfigError(f"{path}: {describe_errors(error)}") from None
    except OSError as error:
        raise ConfigError(f"{path}: metering.token_file: cannot be read: {error.strerror}") from None
    return settings
