"""`syncd notify`: sends a test message, or lists what was sent and still holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from syncd.cli.options import ERROR, ConfigOption, complain, config_path, console, finish

if TYPE_CHECKING:
    from syncd.config.settings import Config


def notify(
    context: typer.Context,
    config: ConfigOption = None,
    test: Annotated[bool, typer.Option("--test", help="Send a test message to each of notify.urls.")] = False,
) -> None:
    """List the notifications that were sent and whose cause still holds, or send a test message.

    `syncd run` sends them; this command sends nothing without --test.
    """
    from syncd.config import settings

    loaded = settings.load(config_path(context, config))
    if test:
        _test(loaded)
    else:
        _list(loaded)


def _test(config: Config) -> None:
    from syncd.notify.sending import send, target_name

    config.notify.check()
    urls = [url.get_secret_value() for url in config.notify.urls]
    if not urls:
        complain("notify.urls is empty: there is nobody to send to (docs/notifications.md)")
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


def _list(config: Config) -> None:
    if not config.daemon.state.exists():
        console().print("nothing was sent yet")
        return
    from syncd.notify.store import Notices
    from syncd.state.database import State

    with State(config.daemon.state) as state:
        holding = Notices(state).holding()
    for notice in holding:
        line = f"{notice.sent_at[:19].replace('T', ' ')} UTC  {notice.topic}  {notice.text}"
        console().print(line, highlight=False, markup=False, soft_wrap=True)
    if not holding:
        console().print("nothing that was sent still holds")
