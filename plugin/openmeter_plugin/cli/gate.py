"""Commands of `openmeter-plugin gate`."""

from __future__ import annotations

import json
import os
import re
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from openmeter_plugin.cli.options import Output, OutputOption, fail
from openmeter_plugin.config.gate_lua import DEFAULT_SOCKET, FEATURE_PATTERN, MODES, post_function
from openmeter_plugin.units import plural

app = typer.Typer(
    help="Manage the gate, which stops requests of customers who have used up what they paid for.",
    no_args_is_help=True,
)
_MAX_SOCKET: Final = 100  # characters; a Unix socket's path has at most 107


@app.callback()
def _group() -> None:
    pass


@app.command()
def lua(
    socket: Annotated[Path, typer.Option(help="Unix socket of the gate, as nginx's workers see it.")] = Path(
        DEFAULT_SOCKET
    ),
    mode: Annotated[
        str | None,
        typer.Option(help=f"At most this mode: {', '.join(MODES)}. Without it, the gate's own setting."),
    ] = None,
    feature: Annotated[
        list[str] | None,
        typer.Option(help="A feature that these requests need, in place of the gate's rules. Repeatable."),
    ] = None,
) -> None:
    """Print the gate's code for Kong's plugin post-function, for gateways where no file can be put.

    It is one element of `config.access`. A post-function that you have stays: add the text to its list.
    """
    if not socket.is_absolute() or len(str(socket)) > _MAX_SOCKET:
        fail(f"--socket: {socket} must be an absolute path of at most {_MAX_SOCKET} characters", os.EX_USAGE)
    if mode is not None and mode not in MODES:
        fail(f"--mode: {mode} is not one of {', '.join(MODES)}", os.EX_USAGE)
    for name in feature or ():
        if not re.search(FEATURE_PATTERN, name):
            fail(
                f"--feature: {name} is not a valid feature key: use lower-case letters, digits and _",
                os.EX_USAGE,
            )
    sys.stdout.write(post_function(str(socket), mode, feature or ()))


SocketOption = Annotated[Path, typer.Option(help="Unix socket of the gate.")]
_NO_KONG: Final = (
    "enable the plugin openmeter-gate there with the path of this socket, and let nginx's workers open it"
    " (socket_mode, or the group of their user)"
)
_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


@app.command()
def allow(
    subject: Annotated[
        str, typer.Argument(metavar="SUBJECT", help="The subject, as in events, such as consumer:1234.")
    ],
    duration: Annotated[str, typer.Option("--for", help="How long, such as 30m, 2h or 3d.")],
    why: Annotated[str, typer.Option(help="The reason, for the log and for others.")],
    by: Annotated[str, typer.Option(help="Who decided it.", envvar="USER")] = "",
    socket: SocketOption = Path(DEFAULT_SOCKET),
) -> None:
    """Allow a subject, and all subjects of its customer, everything for a time."""
    found = re.fullmatch(r"(\d+)([smhd])", duration)
    if found is None:
        fail(f"--for: {duration} is not a duration such as 30m, 2h or 3d", os.EX_USAGE)
    seconds = int(found[1]) * _SECONDS[found[2]]
    body = {"subject": subject, "seconds": seconds, "why": why, "by": by}
    answer = _ask(socket, "POST", "/v1/gate/overrides", json=body)
    sys.stdout.write(f"{subject} is allowed until {_moment(answer['until'])}\n")


@app.command("end")
def end_override(
    subject: Annotated[str, typer.Argument(metavar="SUBJECT", help="The subject of the override.")],
    socket: SocketOption = Path(DEFAULT_SOCKET),
) -> None:
    """End an override now."""
    _ask(socket, "DELETE", "/v1/gate/overrides", params={"subject": subject})
    sys.stdout.write(f"{subject} is no longer allowed by an override\n")


@app.command()
def status(
    socket: SocketOption = Path(DEFAULT_SOCKET),
    output: OutputOption = Output.TEXT,
) -> None:
    """Show whom the gate stops, who is close to the limit, and the overrides."""
    view = _ask(socket, "GET", "/v1/gate")
    if output is Output.JSON:
        sys.stdout.write(json.dumps(view, indent=2) + "\n")
        return
    figures = view["figures"]
    subjects, age = plural(view["subjects"], "subject"), figures["state_age"]
    sys.stdout.write(f"mode {view['mode']}, {subjects}, oldest reading {age:.1f} s\n")
    if not figures["kongs"]:
        sys.stdout.write(f"no Kong asks: {_NO_KONG}\n")
    for kong in figures["kongs"]:
        sys.stdout.write(f"kong {kong['id']} asked {kong['heard']:.1f} s ago, Lua half {kong['lua']}\n")
    for item in view["denied"]:
        sys.stdout.write(f"denied {_who(item)} {item['feature']} {item['reason']}\n")
    for item in view["close"]:
        sys.stdout.write(f"close {_who(item)} {item['feature']} {item['left']:g} of {item['quota']:g} left\n")
    for item in view["overrides"]:
        until = _moment(item["until"])
        sys.stdout.write(f"allowed {item['subject']} until {until} by {item['by'] or '-'}: {item['why']}\n")


def _who(item: dict[str, Any]) -> str:
    return ",".join(item["subjects"]) or str(item["account"])


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def _ask(socket: Path, method: str, path: str, **parts: Any) -> Any:
    import httpx

    try:
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(socket)), timeout=10) as client:
            answer = client.request(method, f"http://gate{path}", **parts)
    except httpx.HTTPError as error:
        fail(f"--socket: the gate does not answer at {socket}: {error}; is serve --gate running?")
    if not answer.is_success:
        try:
            detail = answer.json()["detail"]
        except (ValueError, KeyError, TypeError):
            detail = f"HTTP {answer.status_code}"
        fail(detail if isinstance(detail, str) else "; ".join(str(item.get("msg")) for item in detail))
    return answer.json() if answer.content else None
