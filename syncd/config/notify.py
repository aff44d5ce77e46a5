"""Settings of the notifications."""

from __future__ import annotations

import re
from datetime import timedelta
from importlib.util import find_spec
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, SecretStr

from syncd.config.run import crontab
from syncd.config.types import Duration, Section
from syncd.core.errors import ConfigError

Topic = Literal["failed-runs", "blocked", "unbilled", "dead-letters", "gateways"]
_SCHEMA = re.compile(r"([a-z][a-z0-9+.-]*)://\S+", re.IGNORECASE)


def _notification_url(value: SecretStr) -> SecretStr:
    text = value.get_secret_value().strip()
    if not _SCHEMA.fullmatch(text):
        raise ValueError("must be an Apprise URL, such as slack://... or mailto://...")
    return SecretStr(text)


NotificationUrl = Annotated[SecretStr, AfterValidator(_notification_url)]


class NotifyConfig(Section):
    """Messages to people, sent by `syncd run` through Apprise."""

    urls: tuple[NotificationUrl, ...] = ()
    """Where to send to, as [Apprise URLs](https://github.com/caronc/apprise/wiki): Slack, Teams, mail,
    webhooks. They hold secrets: take them from the environment with `${VAR}`. Needs the extra `[notify]`."""
    topics: tuple[Topic, ...] = ("failed-runs", "blocked", "unbilled", "dead-letters", "gateways")
    """What to send. Each thing is sent once, and again after it had ended."""
    unbilled_events: Annotated[int, Field(ge=1)] = 1
    """Unbilled events from which a message is sent; another one each time that they have doubled."""
    gateway_lag: Duration = timedelta(minutes=15)
    """For how long events must have waited on a gateway, or a gateway must not have answered."""
    summary: Annotated[str, AfterValidator(crontab)] | None = "0 8 * * 1"
    """When to send a summary of the last seven days, as five crontab fields in UTC. `null`: never."""
    timeout: Duration = timedelta(seconds=30)
    """Time for sending one message to all `urls`; after that it is tried again later."""

    def check(self) -> None:
        """Raise ConfigError if there are URLs and Apprise is not installed."""
        if self.urls and find_spec("apprise") is None:
            raise ConfigError(
                "notify.urls needs Apprise, which is not installed: pip install 'kong-openmeter[notify]'"
            )


def schema_of(url: str) -> str:
    """Return the kind of an Apprise URL, the only part of it that may be shown: slack, mailto."""
    found = _SCHEMA.fullmatch(url)
    return found[1].lower() if found else "?"
