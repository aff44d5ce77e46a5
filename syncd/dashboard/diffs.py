"""A plan as a diff: what each change removes and adds. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from openmeter_plugin.units import number, plural
from syncd.core.changes import REMOVALS, Change, ChangeKind, EntityState, Outcome, Plan
from syncd.runs.options import hint_for

Sign = Literal["+", "-", " "]
Tone = Literal["add", "change", "remove", "blocked", "report"]

MAX_LINES: Final = 60
"""Lines shown of one change; the rest is only counted."""
_MAX_UNCHANGED: Final = 5

_ADDS: Final = frozenset(
    {
        ChangeKind.CREATE_CUSTOMER,
        ChangeKind.ATTACH_SUBJECTS,
        ChangeKind.UPSERT_SUBJECT,
        ChangeKind.UNMARK_ORPHANED,
    }
)


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a diff: a field, and a value that is removed, added or unchanged."""

    sign: Sign
    field: str
    text: str


@dataclass(frozen=True, slots=True)
class ChangeView:
    """A change with its diff and, once tried, its result."""

    change: Change
    tone: Tone
    lines: tuple[Line, ...]
    more_lines: int
    usage: str | None
    advice: str | None
    status: str | None
    detail: str


@dataclass(frozen=True, slots=True)
class Result:
    """The result of a change: a value of `syncd.core.changes.Status`, and the reason."""

    status: str
    detail: str


Key = tuple[object, ...]


class Results:
    """The results of a run's changes, looked up by kind, customer and subjects."""

    def __init__(self, found: Iterable[tuple[Key, Result]]) -> None:
        self._exact: dict[Key, Result] = {}
        self._by_customer: dict[Key, Result] = {}
        for key, result in found:
            self._exact.setdefault(key, result)
            self._by_customer.setdefault(key[:-1], result)

    @classmethod
    def of_outcomes(cls, outcomes: Iterable[Outcome]) -> Results:
        """Return the results of a run in memory."""
        return cls((key_of(o.change), Result(str(o.status), o.detail)) for o in outcomes)

    @classmethod
    def of_history(cls, results: Iterable[Mapping[str, Any]]) -> Results:
        """Return the results of a run in the history."""
        return cls(_from_history(item) for item in results)

    def of(self, change: Change) -> Result | None:
        """Return the result of this change, or None if it was not tried.

        A change that was tried with only some of its subjects is found by its customer.
        """
        key = key_of(change)
        found = self._exact.get(key)
        if found is None and change.customer_key and change.kind is not ChangeKind.UPSERT_SUBJECT:
            found = self._by_customer.get(key[:-1])
        return found


def key_of(change: Change) -> Key:
    """Return the lookup key of a change; the subjects come last."""
    who = (str(change.kind), change.customer_key, change.customer_id, change.to_customer_key)
    return (*who, tuple(change.subject_keys))


def _from_history(item: Mapping[str, Any]) -> tuple[Key, Result]:
    change = item["change"]
    who = (change["kind"], change["customer_key"], change["customer_id"], change.get("to_customer_key"))
    return (*who, tuple(change["subject_keys"])), Result(item["status"], item["detail"])


def change_views(changes: Sequence[Change], results: Results) -> list[ChangeView]:
    """Return the changes as the page shows them."""
    return [_view(change, results.of(change)) for change in changes]


def as_read(changes: Sequence[Change]) -> list[Change]:
    """Return the changes in the order of `syncd plan`: blocked ones first, then removals and moves."""
    return sorted(changes, key=_urgency)


def _urgency(change: Change) -> int:
    if change.kind is ChangeKind.BLOCKED:
        return 1 if change.settled else 0
    return 2 if change.kind in REMOVALS or change.kind is ChangeKind.MOVE_SUBJECTS else 3


def kinds(plan: Plan) -> list[tuple[ChangeKind, int, Tone]]:
    """Return the kinds that occur in a plan, with their count and tone."""
    summary = plan.summary()
    return [(kind, summary[kind], tone(kind)) for kind in ChangeKind if summary[kind]]


def tone(kind: ChangeKind) -> Tone:
    """Return the tone in which a kind of change is shown."""
    if kind is ChangeKind.BLOCKED:
        return "blocked"
    if kind in (ChangeKind.UNMANAGED, ChangeKind.ORPHANED):
        return "report"
    if kind in REMOVALS:
        return "remove"
    return "add" if kind in _ADDS else "change"


def _view(change: Change, result: Result | None) -> ChangeView:
    lines = tuple(_lines(change))
    if change.kind is ChangeKind.BLOCKED:
        result = None  # it would only repeat the reason
    return ChangeView(
        change,
        tone(change.kind),
        lines[:MAX_LINES],
        max(0, len(lines) - MAX_LINES),
        _usage(change),
        _advice(change),
        result.status if result else None,
        result.detail if result else "",
    )


def _lines(change: Change) -> Iterator[Line]:
    before, after = change.before, change.after
    if before is None and after is None:
        yield from (Line(" ", "subject", key) for key in change.subject_keys)
        return
    gone = after is None
    before, after = before or EntityState(), after or EntityState()
    yield from _scalar("name", before.name, after.name, gone=gone)
    yield from _subjects(before.subject_keys, after.subject_keys, gone=gone)
    details_before, details_after = _flat(before.details.to_json()), _flat(after.details.to_json())
    for name in dict.fromkeys([*details_before, *details_after]):
        yield from _scalar(name, details_before.get(name), details_after.get(name), gone=gone)
    yield from _metadata(before.metadata or {}, after.metadata or {}, gone=gone)


def _scalar(field: str, before: str | None, after: str | None, *, gone: bool) -> Iterator[Line]:
    """Yield a value before and after; None after means unchanged, unless the whole entity is `gone`."""
    if before is not None and (gone or (after is not None and after != before)):
        yield Line("-", field, before)
    if after is not None and after != before:
        yield Line("+", field, after)


def _subjects(before: tuple[str, ...] | None, after: tuple[str, ...] | None, *, gone: bool) -> Iterator[Line]:
    if after is None:
        yield from (Line("-" if gone else " ", "subject", key) for key in before or ())
        return
    old, new = set(before or ()), set(after)
    unchanged = [key for key in before or () if key in new]
    yield from (Line(" ", "subject", key) for key in unchanged[:_MAX_UNCHANGED])
    if (rest := len(unchanged) - _MAX_UNCHANGED) > 0:
        yield Line(" ", "subject", f"... and {number(rest)} more unchanged")
    yield from (Line("-", "subject", key) for key in before or () if key not in new)
    yield from (Line("+", "subject", key) for key in after if key not in old)


def _metadata(before: Mapping[str, object], after: Mapping[str, object], *, gone: bool) -> Iterator[Line]:
    """Yield the metadata; they are merged, so entries missing from `after` stay."""
    for name, value in before.items():
        if gone:
            yield Line("-", "metadata", f"{name} = {value}")
        elif name not in after or after[name] == value:
            yield Line(" ", "metadata", f"{name} = {value}")
        else:
            yield Line("-", "metadata", f"{name} = {value}")
            yield Line("+", "metadata", f"{name} = {after[name]}")
    yield from (Line("+", "metadata", f"{name} = {after[name]}") for name in after if name not in before)


def _flat(details: Mapping[str, object]) -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in details.items():
        if isinstance(value, dict):
            flat.update({f"{name}.{part}": str(inner) for part, inner in value.items()})
        else:
            flat[name] = str(value)
    return flat


def _usage(change: Change) -> str | None:
    """Return what happens to the usage that a change affects."""
    if change.usage is None or not change.usage.events:
        return None
    events = f"{plural(change.usage.events, 'event')} since {change.usage.since[:10]}"
    one = change.usage.events == 1
    if change.kind is ChangeKind.BLOCKED:
        return f"{events} {'remains' if one else 'remain'} unbilled until then"
    if change.kind is ChangeKind.MOVE_SUBJECTS:
        return f"{events} {'moves' if one else 'move'} as well"
    if change.kind is ChangeKind.DELETE_SUBJECT:
        return events
    return f"{events} {'becomes' if one else 'become'} unbilled"


def _advice(change: Change) -> str | None:
    """Return which option of the form allows a blocked change; its reason names that of the command line."""
    option = hint_for(change.reason) if change.kind is ChangeKind.BLOCKED else None
    return f"To allow it, preview again with “{option}” under Options." if option else None
