"""From configuration to sources, target and rules; the only place that knows all of them."""

from __future__ import annotations

import time
from collections.abc import Callable

from syncd.config import (
    ApplicationsFileSource,
    Config,
    DeclarativeFileSource,
    KongAdminSource,
    SourceConfig,
    StaticSource,
)
from syncd.http import Endpoint
from syncd.mapping import MappingRules
from syncd.retry import Retry
from syncd.sources import Source
from syncd.sources.applications_file import ApplicationsFile
from syncd.sources.declarative_file import DeclarativeFile
from syncd.sources.kong_admin import KongAdmin
from syncd.sources.static import Static, StaticSubject
from syncd.targets import MeteringTarget
from syncd.targets.openmeter_v1 import OpenMeterV1


def sources_of(config: Config, sleep: Callable[[float], object] = time.sleep) -> tuple[Source, ...]:
    """Return the sources in the order of the configuration."""
    retry = Retry(attempts=config.metering.attempts, sleep=sleep)
    return tuple(_source(source, index, retry) for index, source in enumerate(config.sources))


def target_of(config: Config, sleep: Callable[[float], object] = time.sleep) -> MeteringTarget:
    """Return the metering API; close it after use."""
    metering = config.metering
    endpoint = Endpoint(
        name="metering API",
        url=metering.url,
        token_setting="metering.token",  # noqa: S106 - the name of a setting
        rights="read and write customers and subjects, and to read meters",
        token=metering.token.get_secret_value() if metering.token else None,
        timeout=metering.timeout.total_seconds(),
    )
    return OpenMeterV1(endpoint, Retry(attempts=metering.attempts, sleep=sleep))


def rules_of(config: Config) -> MappingRules:
    """Return the rules of the mapping."""
    return MappingRules(
        owner_id=config.owner_id,
        group_by=config.mapping.group_by,
        subject_field=config.mapping.subject_field,
        include_anonymous=config.mapping.include_anonymous,
        anonymous_consumers=frozenset(config.mapping.anonymous_consumers),
    )


def _source(source: SourceConfig, index: int, retry: Retry) -> Source:
    match source:
        case KongAdminSource():
            return _kong_admin(source, index, retry)
        case DeclarativeFileSource():
            return DeclarativeFile(source.path)
        case ApplicationsFileSource():
            return ApplicationsFile(source.path)
        case StaticSource():
            subjects = tuple(
                StaticSubject(subject.key, subject.name, subject.metadata, subject.customer)
                for subject in source.subjects
            )
            return Static(subjects, index)


def _kong_admin(source: KongAdminSource, index: int, retry: Retry) -> KongAdmin:
    endpoint = Endpoint(
        name="Kong's Admin API",
        url=source.url,
        token_setting=f"sources[{index}].token",
        rights="read consumers, plugins and the status",
        token_header="Kong-Admin-Token",  # noqa: S106 - a header's name
        token=source.token.get_secret_value() if source.token else None,
        timeout=source.timeout.total_seconds(),
    )
    return KongAdmin(endpoint, retry, source.workspace, source.tags)
