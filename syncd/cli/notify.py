"""`syncd notify`: sends a test message, or lists what was sent and still holds."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from syncd.cli.options import (
    ERROR,
    ConfigOption,
    Output,
    OutputOption,
    complain,
    config_path,
    console,
    finish,
    print_json,
)

if TYPE_CHECKING:
    from syncd.config.settings import Config
    from syncd.notify.store import SentNotice


def notify(
    context: typer.Context,
    config: ConfigOption = None,
    test: Annotated[bool, typer.Option("--test", help="Send a test message to each of notify.urls.")] = False,
    output: OutputOption = Output.TEXT,
) -> None:
    """List the notifications that were sent and still hold, or send a test message.

    `syncd run` sends them; this command sends nothing without --test.
    """
    from syncd.config import settings

    loaded = settings.load(config_path(context, config))
    if test:
        _test(loaded)
    else:
        _list(loaded, as_json=output is Output.JSON)


def _test(config: Config) -> None:
    from syncd.notify.sending import send, target_name

    config.notify.check()
    urls = [url.get_secret_value() for url in config.notify.urls]
    if not urls:
        complain("notify.urls is empty, so there is nowhere to send to (docs/notifications.md)")
        finish(ERROR)
    title, body = f"syncd {config.owner_id}: test", "This is a test of notify.urls. Nothing has happened."
    failures = {one.index: one for one in send(urls, title, body, config.notify.timeout.total_seconds())}
    for index, url in enumerate(urls):
        if index not in failures:
            console().print(f"sent to {target_name(index, url)}", highlight=False, markup=False)
    for failure in failures.values():
        complain(f"{failure.name} failed: {failure.reason}")
    if failures:
        finish(ERROR)


def _list(config: Config, *, as_json: bool) -> None:
    holding = _holding(config)
    if as_json:
        print_json({"notices": [asdict(notice) for notice in holding or ()]})
        return
    if holding is None:
        console().print("nothing was sent yet")
        return
    for notice in holding:
        line = f"{notice.sent_at[:19].replace('T', ' ')} UTC  {notice.topic}  {notice.text}"
        console().print(line, highlight=False, markup=False, soft_wrap=True)
    if not holding:
        console().print("nothing that was sent still holds")


def _holding(config: Config) -> list[SentNotice] | None:
    """Return what was sent and still holds, None if there is no state to read."""
    if not config.daemon.state.exists():
        return None
    from syncd.notify.store import Notices
    from syncd.state.database import State

    with State(config.daemon.state) as state:
        return Notices(state).holding()
