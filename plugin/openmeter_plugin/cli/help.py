"""Help of commands: options as people type them. syncd's commands use it too."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

_LARGEST = str(2**63 - 1)
"""The limit of an id in SQLite says nothing to a person."""
_VALUES = {
    "<str>": "TEXT",
    "<list[str]>": "TEXT",
    "<path>": "PATH",
    "<int>": "NUMBER",
    "<int range>": "NUMBER",
    "<float>": "NUMBER",
    "<float range>": "NUMBER",
    "<list[int]>": "NUMBER",
}
"""Values of options, by the Python types that typer shows for them."""


def readable(parameters: list[Any], context: Any) -> list[Any]:
    """Return the parameters of a command without types of Python and without limits that no value reaches.

    Otherwise help shows that a flag takes a value (``--force <bool>``), ``--wait <float range>``,
    ``MONTH <str>`` and ``[x<=9223372036854775807]``.
    """
    for parameter in parameters:
        if getattr(parameter, "param_type_name", "") == "argument":
            parameter.display_type_rich = _no_type  # its name says enough: MONTH <str>
        elif parameter.metavar is None:
            parameter.metavar = _value(parameter, context)
        limits = getattr(parameter, "_get_number_range_help_str", None)  # typer has no public name for it
        if limits is not None and _LARGEST in (limits() or ""):
            parameter._get_number_range_help_str = str
    return parameters


def _no_type(**_context: Any) -> None:
    return None


def _value(parameter: Any, context: Any) -> str | None:
    """Return what help shows for the value of an option; None leaves it to typer, as for choices."""
    if getattr(parameter, "is_bool_flag", False):
        return ""
    shown = getattr(parameter, "display_type", None)  # older releases of typer show TEXT by themselves
    return _VALUES.get(shown(context)) if shown is not None else None


class Group(TyperGroup):
    """A program, or a group of its commands."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the options."""
        return readable(super().get_params(ctx), ctx)


class Command(TyperCommand):
    """A command."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the options."""
        return readable(super().get_params(ctx), ctx)


def make_readable(app: typer.Typer) -> None:
    """Have a program and all commands that it has so far show readable options."""
    app.info.cls = Group
    for command in app.registered_commands:
        command.cls = Command
    for group in app.registered_groups:
        if group.typer_instance is not None:
            make_readable(group.typer_instance)
