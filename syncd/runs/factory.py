"""Factory: makes sources, target, gateways and rules from the configuration, and checks those in files."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from syncd.config.settings import Config
from syncd.config.sources import (
    ApplicationsFileSource,
    DeclarativeFileSource,
    KongAdminSource,
    KonnectApplicationsSource,
    KonnectConsumersSource,
    SourceConfig,
    StaticSource,
    source_names,
)
from syncd.core.errors import StateError
from syncd.core.model import Principal
from syncd.gateways.client import Gateway
from syncd.http.endpoint import Endpoint
from syncd.http.retry import Pace, Permit, Retry, unlimited
from syncd.mapping.desired_state import desired_state
from syncd.mapping.mapping_file import read_mapping_file
from syncd.mapping.rules import MappingRules
from syncd.metering.base import MeteringApi
from syncd.metering.dialects import DIALECTS
from syncd.sources.base import Source
from syncd.sources.files import ApplicationsFile, DeclarativeFile, Static, StaticSubject
from syncd.sources.kong_admin import KongAdmin
from syncd.sources.konnect import KonnectApplications, KonnectConsumers

if TYPE_CHECKING:
    from syncd.runs.history import History

CONSUMER_RIGHTS = "read consumers and plugins of the control plane (role Viewer of Control Planes)"
"""Permissions that a source of consumers needs in Konnect."""

_USAGE_TIMEOUT_SECONDS = 3.0


def _never() -> bool:
    return False


def retry_of(
    config: Config,
    sleep: Callable[[float], object] = time.sleep,
    should_stop: Callable[[], bool] = _never,
) -> Retry:
    """Return the one policy of retries; `should_stop` ends requests and waits."""
    return Retry(attempts=config.metering.attempts, sleep=sleep, should_stop=should_stop)


def sources_of(
    config: Config,
    sleep: Callable[[float], object] = time.sleep,
    should_stop: Callable[[], bool] = _never,
) -> tuple[Source, ...]:
    """Return the sources in the order of the configuration; equal settings make equal sources."""
    retry = retry_of(config, sleep, should_stop)
    named = zip(config.sources, source_names(config.sources), strict=True)
    return tuple(_source(source, index, name, retry) for index, (source, name) in enumerate(named))


def metering_endpoint(config: Config) -> Endpoint:
    """Return the endpoint and token of the metering API."""
    metering = config.metering
    roles = " (roles Billing Admin and Metering Viewer)" if metering.is_konnect else ""
    return Endpoint(
        api="metering",
        url=metering.base_url,
        token_setting="metering.token",  # noqa: S106 - the name of a setting
        rights=f"read and write customers and subjects, and to read meters{roles}",
        token=metering.token.get_secret_value() if metering.token else None,
        timeout=metering.timeout.total_seconds(),
        tls=metering.tls,
        proxy=metering.proxy_url,
    )


def target_of(
    config: Config,
    sleep: Callable[[float], object] = time.sleep,
    should_stop: Callable[[], bool] = _never,
    permit: Permit = unlimited,
) -> MeteringApi:
    """Return the client of the metering API, one for each run; close it after use.

    `permit` is called before anything that may change something is sent.
    """
    retry = replace(retry_of(config, sleep, should_stop), permit=permit)
    return DIALECTS[config.metering.dialect].open(metering_endpoint(config), retry)


def quick_target_of(
    config: Config,
    timeout: float,
    should_stop: Callable[[], bool] = _never,
    pace: Pace | None = None,
    sleep: Callable[[float], object] = time.sleep,
) -> MeteringApi:
    """Return a client that tries once, with a shorter time-out; with its own `pace` it waits for no run."""
    endpoint = metering_endpoint(config)
    endpoint = replace(endpoint, timeout=min(endpoint.timeout, timeout))
    retry = Retry(attempts=1, sleep=sleep, should_stop=should_stop, pace=pace)
    return DIALECTS[config.metering.dialect].open(endpoint, retry)


def usage_reader_of(
    config: Config,
    sleep: Callable[[float], object] = time.sleep,
    should_stop: Callable[[], bool] = _never,
) -> MeteringApi:
    """Return a client for figures that are only a note: it asks once, and waits a short time."""
    return quick_target_of(config, _USAGE_TIMEOUT_SECONDS, should_stop, sleep=sleep)


def gateways_of(config: Config) -> tuple[Gateway, ...]:
    """Return the gateways in the order of the configuration; close each after use."""
    attempts = config.metering.attempts
    return tuple(Gateway(gateway, index, attempts=attempts) for index, gateway in enumerate(config.gateways))


@contextmanager
def existing_history(config: Config) -> Iterator[History | None]:
    """Open the history if there is one that can be used; a dry run needs none and creates none."""
    if not config.daemon.state.exists():
        yield None
        return
    # Imported here: a plan without a history does not wait for SQLAlchemy.
    from syncd.runs.history import History
    from syncd.state.database import State

    try:
        state = State(config.daemon.state)
    except StateError:
        yield None
        return
    with state:
        yield History(state)


def rules_of(config: Config) -> MappingRules:
    """Return the mapping rules, with the current content of the mapping file; raises ConfigError."""
    return MappingRules(
        owner_id=config.owner_id,
        group_by=config.mapping.group_by,
        subject_field=config.mapping.subject_field,
        prefixes=config.mapping.subject_prefixes.compiled(),
        include_anonymous=config.mapping.include_anonymous,
        anonymous_consumers=frozenset(config.mapping.anonymous_consumers),
        templates=config.mapping.templates,
        assignments=read_mapping_file(config.mapping.file) if config.mapping.file else (),
        max_subjects_per_customer=config.mapping.max_subjects_per_customer,
        overflow=config.mapping.overflow,
        labels_only=DIALECTS[config.metering.dialect].labels_only,
    )


def _source(source: SourceConfig, index: int, name: str, retry: Retry) -> Source:
    match source:
        case KongAdminSource():
            return KongAdmin(kong_endpoint(source, index), retry, source.workspace, source.tags, name)
        case KonnectConsumersSource():
            endpoint = konnect_endpoint(source, index, CONSUMER_RIGHTS)
            return KonnectConsumers(endpoint, retry, source.control_plane_id, source.tags, name)
        case KonnectApplicationsSource():
            endpoint = konnect_endpoint(source, index, "read applications and registrations of the portal")
            return KonnectApplications(endpoint, retry, source.portal_id, source.mapped_consumers, name)
        case DeclarativeFileSource():
            return DeclarativeFile(source.path, name)
        case ApplicationsFileSource():
            return ApplicationsFile(source.path, name)
        case StaticSource():
            subjects = tuple(
                StaticSubject(subject.key, subject.name, subject.metadata, subject.customer)
                for subject in source.subjects
            )
            return Static(subjects, name)


def kong_endpoint(source: KongAdminSource, index: int) -> Endpoint:
    """Return the endpoint and token of this source's Admin API."""
    return Endpoint(
        api="kong-admin",
        url=source.url,
        token_setting=f"sources[{index}].token",
        rights="read consumers, plugins and the status",
        token_header="Kong-Admin-Token",  # noqa: S106 - a header's name
        token=source.token.get_secret_value() if source.token else None,
        timeout=source.timeout.total_seconds(),
        tls=source.tls,
        proxy=source.proxy_url,
    )


def konnect_endpoint(
    source: KonnectConsumersSource | KonnectApplicationsSource, index: int, rights: str
) -> Endpoint:
    """Return the endpoint and token of Konnect for this source; the token needs `rights`."""
    return Endpoint(
        api="konnect",
        url=source.base_url,
        token_setting=f"sources[{index}].token",
        rights=rights,
        token=source.token.get_secret_value() if source.token else None,
        timeout=source.timeout.total_seconds(),
        tls=source.tls,
        proxy=source.proxy_url,
    )


_LOCAL = (DeclarativeFile, ApplicationsFile, Static)


@dataclass(frozen=True, slots=True)
class Checked:
    """The number of principals that local sources have, and what a person should know."""

    principals: int
    notes: tuple[str, ...]


def examine_files(config: Config) -> Checked:
    """Read the mapping file and the local sources; raises ConfigError or SourceError.

    Only if all sources are local can rows of the mapping file that match no principal be told.
    """
    config.notify.check()
    rules = rules_of(config)
    principals: list[Principal] = []
    remote: list[str] = []
    for source in sources_of(config):
        if isinstance(source, _LOCAL):
            principals += source.read()
        else:
            remote.append(source.name)
    notes: list[str] = []
    if remote:
        notes.append(f"not read, because that needs the network: {', '.join(remote)}")
    else:
        desired = desired_state(principals, rules)
        notes += [*desired.warnings, *(problem.reason for problem in desired.problems)]
    return Checked(len(principals), tuple(notes))
