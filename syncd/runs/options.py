"""The options of a run: one table that the commands, the API, the pages and reviewed plans read.

Each field of `RunOptions` with an `_option` is an entry; adding an option is adding such a field.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import wraps
from typing import Annotated, Any, Literal, TypeVar

from syncd.core.changes import Plan
from syncd.planning.guards import Scope

Place = Literal["plan", "apply", "resync"]
"""A command that offers options. The API offers all of them."""

_EVERYWHERE: tuple[Place, ...] = ("plan", "apply", "resync")
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Entry:
    """How one option is offered and described.

    `help` is for the command line, `words` describe a run that had it, `label` is that of the dashboard's
    form (None: not on the form). A `reviewed` option affects the plan, so it is part of a reviewed one.
    With a `previewed` option `resync` shows the plan before it applies it.
    """

    help: str
    words: str | None = None
    label: str | None = None
    metavar: str | None = None
    places: tuple[Place, ...] = _EVERYWHERE
    reviewed: bool = True
    previewed: bool = False
    hint: str | None = None
    """Words in the reason of a blocked change that this option allows."""


def _option(default: _T, entry: Entry) -> _T:
    return field(default=default, metadata={"entry": entry})


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Options of one run: its scope, and the guards and policies that the operator lifted.

    With `reviewed`, the run applies exactly that plan or fails.
    """

    dry_run: bool = False
    force: bool = _option(
        False,
        Entry(
            "Override the guards on the share of changes.",
            "guards overridden",
            places=("apply", "resync"),
            reviewed=False,
        ),
    )
    allow_move: bool = _option(
        False,
        Entry(
            "Move subjects between managed customers, with usage not yet invoiced.",
            "moves allowed",
            "Move subjects between managed customers; usage not yet invoiced moves too",
            previewed=True,
            hint="--allow-move",
        ),
    )
    adopt: bool = _option(
        False,
        Entry(
            "Adopt existing customers whose key matches exactly.",
            "adoptions allowed",
            "Adopt existing customers whose key matches",
            previewed=True,
            hint="belongs to someone else",
        ),
    )
    allow_empty: bool = _option(
        False,
        Entry(
            "Allow removals (policy sync) even if a source returns no consumers.",
            "empty sources allowed",
            "Allow removals even if a source returns no consumers",
            hint="--allow-empty",
        ),
    )
    source: str | None = _option(
        None, Entry("Only principals of this source; removes nothing.", metavar="NAME")
    )
    principal: str | None = _option(
        None,
        Entry(
            "Only the principal with this id, username or custom_id; removes nothing.",
            metavar="ID",
        ),
    )
    reviewed: Plan | None = None

    @property
    def scope(self) -> Scope:
        """Return which principals the run concerns."""
        return Scope(self.source, self.principal)

    def reviewable(self) -> dict[str, object]:
        """Return the options that affect a plan, for its file."""
        return {name: getattr(self, name) for name, entry in TABLE.items() if entry.reviewed}

    def as_reviewed(self, options: Mapping[str, object]) -> RunOptions:
        """Return these options combined with those that a plan file was made with."""
        given: dict[str, Any] = {name: _read(name, options.get(name)) for name in self.reviewable()}
        return replace(self, **given)

    def to_json(self) -> dict[str, object]:
        """Return the options as in the history."""
        given = {name: getattr(self, name) for name in TABLE}
        return {"dry_run": self.dry_run, **given, "reviewed": self.reviewed is not None}


TABLE: dict[str, Entry] = {
    entry.name: entry.metadata["entry"] for entry in fields(RunOptions) if "entry" in entry.metadata
}
"""All options that a person may give, by name."""


def is_flag(name: str) -> bool:
    """Return whether an option is on or off; the others are texts."""
    return TABLE[name].metavar is None


def flag(name: str) -> str:
    """Return an option as on the command line."""
    return f"--{name.replace('_', '-')}"


def _read(name: str, given: object) -> bool | str | None:
    if is_flag(name):
        return given is True
    return str(given) if given else None


def from_form(form: Mapping[str, str]) -> RunOptions:
    """Return the options of the dashboard's form, for a dry run."""
    given: dict[str, Any] = {
        name: (name in form) if is_flag(name) else form.get(name, "").strip() or None
        for name, entry in TABLE.items()
        if entry.label or not is_flag(name)
    }
    return RunOptions(dry_run=True, **given)


def described(options: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the options of a run (`RunOptions.to_json`) in words."""
    words = [entry.words for name, entry in TABLE.items() if entry.words and options.get(name)]
    if options.get("reviewed"):
        words.append("as reviewed")
    texts = [f"{name} {options[name]}" for name in TABLE if not is_flag(name) and options.get(name)]
    return (*words, *texts)


def option_for(reason: str) -> str | None:
    """Return the option that allows a change blocked for this reason, None if none does."""
    return next((name for name, e in TABLE.items() if e.hint and e.label and e.hint in reason), None)


def hint_for(reason: str) -> str | None:
    """Return the label of the form's option that allows a change blocked for this reason, if one does."""
    name = option_for(reason)
    return (TABLE[name].label or "").split(";")[0] if name else None


def offering(
    place: Place, completions: Mapping[str, Callable[..., Any]] | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options that its place offers; it receives them as `options`, a RunOptions.

    `completions` suggest values of an option to a shell.
    """
    import typer

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        offered = {name: entry for name, entry in TABLE.items() if place in entry.places}

        @wraps(command)
        def with_options(**given: Any) -> None:
            options = RunOptions(**{name: given.pop(name) for name in offered})
            command(**given, options=options)

        own = inspect.signature(command, eval_str=True).parameters
        parameters = [parameter for name, parameter in own.items() if name != "options"]
        for name, entry in offered.items():
            kind: Any = bool if is_flag(name) else str | None
            complete = (completions or {}).get(name)
            option = typer.Option(flag(name), metavar=entry.metavar, help=entry.help, autocompletion=complete)
            default = False if is_flag(name) else None
            parameters.append(
                inspect.Parameter(
                    name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=default,
                    annotation=Annotated[kind, option],
                )
            )
        kept = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
        with_options.__signature__ = inspect.Signature(kept)  # type: ignore[attr-defined]
        with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in kept}
        return with_options

    return decorate
