"""Commands of `openmeter-plugin gate`."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Annotated, Final

import typer

from openmeter_plugin.cli.options import fail
from openmeter_plugin.config.gate_lua import DEFAULT_SOCKET, FEATURE_PATTERN, MODES, post_function

app = typer.Typer(
    help="The gate: stops requests whose customers have used up what they paid for.", no_args_is_help=True
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
    """Print the gate as a text for Kong's plugin post-function, for gateways where no file can be put.

    It is one element of `config.access`. A post-function that you have stays: add the text to its list.
    """
    if not socket.is_absolute() or len(str(socket)) > _MAX_SOCKET:
        fail(f"--socket: {socket} must be an absolute path of at most {_MAX_SOCKET} characters", os.EX_USAGE)
    if mode is not None and mode not in MODES:
        fail(f"--mode: {mode} is not one of {', '.join(MODES)}", os.EX_USAGE)
    for name in feature or ():
        if not re.search(FEATURE_PATTERN, name):
            fail(f"--feature: {name} is no key of a feature: lower-case letters, digits and _", os.EX_USAGE)
    sys.stdout.write(post_function(str(socket), mode, feature or ()))
