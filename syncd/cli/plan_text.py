"""A plan for people: what is blocked first, by cause, then removals and moves, then the rest by customer.

On a terminal it is coloured and wrapped, and long lists of what only adds or reports are cut: a problem never
is. Elsewhere each line is whole, and nothing is cut.
"""

from __future__ import annotations

import html
import re
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from rich.console import Console
from rich.text import Text

from openmeter_plugin.units import plural
from syncd.cli.options import printable
from syncd.cli.render import counts, line
from syncd.core.changes import Change, ChangeKind, Outcome, Plan, Status, count
from syncd.core.unbilled import UnbilledUsage

_MAX_LINES = 100
"""Lines of additions or reports on a terminal, and in Markdown: a comment on GitHub has 65,536 bytes."""
_MAX_NAMES = 20
_STYLES = {"!": "bold red", "-": "red", "~": "yellow", "+": "green", "=": "dim"}
_DANGEROUS = (
    ChangeKind.DELETE_CUSTOMER,
    ChangeKind.DETACH_SUBJECTS,
    ChangeKind.MOVE_SUBJECTS,
    ChangeKind.MARK_ORPHANED,
    ChangeKind.DELETE_SUBJECT,
)
_ADDED = frozenset({ChangeKind.CREATE_CUSTOMER, ChangeKind.ATTACH_SUBJECTS, ChangeKind.ADOPT_CUSTOMER})


@dataclass(frozen=True, slots=True)
class Entry:
    """One line: a sign, what changes, and more about it on lines of their own."""

    sign: str
    text: str
    details: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Group:
    """Entries with a common title; `cure` is what to do about all. One that `may_be_cut` is no problem."""

    title: str
    entries: tuple[Entry, ...]
    cure: str = ""
    may_be_cut: bool = False


def groups_of(plan: Plan) -> list[Group]:
    """Return what a plan says, the most urgent first."""
    blocked = plan.of(ChangeKind.BLOCKED)
    found = [
        *_blocked([change for change in blocked if not change.settled], "Blocked"),
        *_blocked([change for change in blocked if change.settled], "Blocked by decision"),
    ]
    dangerous = [change for kind in _DANGEROUS for change in plan.of(kind)]
    found.append(Group("Removals and moves", tuple(map(_removal, dangerous))))
    changed: list[Entry] = []
    created: list[Entry] = []
    for key, changes in _by_customer(plan):
        (created if changes[0].kind is ChangeKind.CREATE_CUSTOMER else changed).append(_edited(key, changes))
    found.append(Group("Changes", tuple(changed)))
    found.append(Group("New", tuple(created), may_be_cut=True))
    found += _reported((*plan.of(ChangeKind.ORPHANED), *plan.of(ChangeKind.UNMANAGED)))
    return [group for group in found if group.entries]


def _reported(changes: Iterable[Change]) -> Iterator[Group]:
    """Yield one group for each reason that several customers share, and one for the others."""
    alike: dict[str, dict[str | None, list[Change]]] = defaultdict(lambda: defaultdict(list))
    for change in changes:
        alike[change.reason][change.customer_key or change.customer_id].append(change)
    single: list[Entry] = []
    for reason, inside in alike.items():
        entries = [Entry("=", _customer(name, *several)) for name, several in inside.items()]
        if len(entries) > 1:
            yield Group(f"Left alone: {reason}", tuple(entries), may_be_cut=True)
        else:
            single.append(replace(entries[0], details=(reason,)))
    yield Group("Left alone", tuple(single), may_be_cut=True)


def _blocked(changes: Sequence[Change], title: str) -> Iterator[Group]:
    """Yield one group for each cause, the one with the most unbilled events first."""
    causes: dict[str, list[Change]] = defaultdict(list)
    for change in changes:
        causes[str(change.cause or "")].append(change)
    for inside in sorted(causes.values(), key=lambda some: -_events(some)):
        if (cause := inside[0].cause) is None:
            yield Group(title, tuple(_merged(inside, [change.reason for change in inside])))
        else:
            facts = [change.fact for change in inside]
            yield Group(f"{title}: {cause.heading}", tuple(_merged(inside, facts)), cause.cure)


def _merged(changes: Sequence[Change], words: Sequence[str]) -> Iterator[Entry]:
    """Yield an entry for all changes of one customer that have the same words."""
    alike: dict[tuple[str | None, str], list[Change]] = defaultdict(list)
    for change, text in zip(changes, words, strict=True):
        alike[change.customer_key, text].append(change)
    for (key, text), inside in sorted(alike.items(), key=lambda item: -_events(item[1])):
        details = [text] if text else []
        if (events := _events(inside)) and (since := _since(inside)):
            details.insert(0, f"{plural(events, 'event')} since {since}, unbilled until then")
        if key is None and not any(change.subject_keys for change in inside):
            yield Entry("!", text)
        else:
            yield Entry("!", _customer(key, *inside), tuple(details))


def _events(changes: Iterable[Change]) -> float:
    return sum(change.usage.events for change in changes if change.usage)


def _since(changes: Iterable[Change]) -> str:
    return min((change.usage.since[:10] for change in changes if change.usage), default="")


def _customer(key: str | None, *changes: Change) -> str:
    """Return a customer with the subjects that a change is about: ``customer acme (alice, bob)``."""
    names = ", ".join(name for change in changes for name in _names(change))
    if key is None:
        return names
    return f"customer {key} ({names})" if names else f"customer {key}"


def _names(change: Change) -> tuple[str, ...]:
    """Return who the subjects of a change belong to, else their keys."""
    return change.names if len(change.names) == len(change.subject_keys) else change.subject_keys


def _removal(change: Change) -> Entry:
    names = ", ".join(_names(change))
    match change.kind:
        case ChangeKind.DELETE_CUSTOMER:
            sign, text = "-", _customer(change.customer_key, change)
        case ChangeKind.DETACH_SUBJECTS:
            sign, text = "-", f"customer {change.customer_key}: detach {names}"
        case ChangeKind.MOVE_SUBJECTS:
            sign, text = "~", f"customer {change.customer_key}: move {names} to {change.to_customer_key}"
        case ChangeKind.DELETE_SUBJECT:
            sign, text = "-", f"subject entity {names}"
        case _:
            sign, text = "~", f"customer {change.customer_key}: mark {names or 'it'} as orphaned"
    return Entry(sign, text, (change.reason, *_lost(change)))


def _lost(change: Change) -> Iterator[str]:
    """Yield what becomes of the usage of a removed or moved subject."""
    if change.usage is None or not change.usage.events:
        return
    events = f"{plural(change.usage.events, 'event')} since {change.usage.since[:10]}"
    match change.kind:
        case ChangeKind.MOVE_SUBJECTS:
            yield f"{events}, the last 31 days: without a subscription no period is open"
        case ChangeKind.DELETE_SUBJECT:
            yield events
        case _:
            yield f"{events}, unbilled afterwards unless already invoiced"


def _by_customer(plan: Plan) -> list[tuple[str | None, list[Change]]]:
    """Return the other changes by customer: those of its subject entities come with it."""
    found: dict[str | None, list[Change]] = defaultdict(list)
    for change in plan.actionable:
        if change.kind not in _DANGEROUS:
            found[change.customer_key].append(change)
    return list(found.items())


def _edited(key: str | None, changes: Sequence[Change]) -> Entry:
    """Return one line for all changes of a customer; the subject entity of an added subject needs none."""
    created = next((change for change in changes if change.kind is ChangeKind.CREATE_CUSTOMER), None)
    new = {subject for change in changes if change.kind in _ADDED for subject in change.subject_keys}
    parts = [part for change in changes if change is not created for part in _part(change)]
    upserts = [change for change in changes if change.kind is ChangeKind.UPSERT_SUBJECT]
    written = [name for change in upserts if new.isdisjoint(change.subject_keys) for name in _names(change)]
    if written:
        parts.append(f"write the subject entities of {', '.join(written)}")
    if created is not None:
        called = created.after.name if created.after else None
        details = [f"name {called}"] if called and called != key and called not in _names(created) else []
        return Entry("+", _customer(key, created), (*details, *parts))
    return Entry("~", f"customer {key}: {'; '.join(parts)}")


def _part(change: Change) -> Iterator[str]:
    before, after = change.before, change.after
    match change.kind:
        case ChangeKind.ATTACH_SUBJECTS:
            yield f"add {', '.join(_names(change))}"
        case ChangeKind.RENAME_CUSTOMER if before and after:
            yield f"rename {before.name!r} to {after.name!r}"
        case ChangeKind.ADOPT_CUSTOMER:
            yield "adopt it; it keeps its name"
        case ChangeKind.UNMARK_ORPHANED:
            yield f"{', '.join(_names(change)) or 'it'} is back: remove the orphan mark"
        case _:
            return


# Text


def show_plan(console: Console, plan: Plan) -> None:
    """Print a plan; its counts come last."""
    for group in groups_of(plan):
        _show(console, group)
    for note in plan.notes:
        _wrapped(console, f"Note: {note}.", "")
    if plan.unbilled and plan.unbilled.subjects:
        _wrapped(console, f"Unbilled: {unbilled_text(plan.unbilled)}.", "")
    if plan.unbilled and plan.unbilled.ignored:
        _wrapped(console, f"Ignored: {ignored_text(plan.unbilled)}.", "")
    _wrapped(console, summary(plan), "")


def summary(plan: Plan) -> str:
    """Return the counts of a plan, customer by customer."""
    numbers = {"to create": 0, "to change": 0, "to remove": 0, "blocked": 0, "left alone": 0}
    for _, changes in _by_customer(plan):
        new = any(change.kind is ChangeKind.CREATE_CUSTOMER for change in changes)
        numbers["to create" if new else "to change"] += 1
    for change in plan.changes:
        if change.kind in _DANGEROUS:
            moved = change.kind in (ChangeKind.MOVE_SUBJECTS, ChangeKind.MARK_ORPHANED)
            numbers["to change" if moved else "to remove"] += 1
    numbers["blocked"] = len(plan.of(ChangeKind.BLOCKED))
    numbers["left alone"] = len(plan.of(ChangeKind.UNMANAGED)) + len(plan.of(ChangeKind.ORPHANED))
    return f"Plan: {counts(numbers)}." if plan.changes else "Plan: nothing to do, nothing to report."


def show_outcomes(console: Console, outcomes: tuple[Outcome, ...]) -> None:
    """Print the changes that were blocked or skipped, and the number of each outcome."""
    entries = tuple(
        _unapplied(outcome)
        for outcome in outcomes
        if outcome.status in {Status.BLOCKED, Status.SKIPPED}
        and outcome.change.kind is not ChangeKind.BLOCKED
    )
    if entries:
        _show(console, Group("Not applied", entries))
    line(console, f"Applied: {counts(count(outcomes))}.")


def _unapplied(outcome: Outcome) -> Entry:
    change = outcome.change
    text = f"{change.kind} {_customer(change.customer_key, change)}"
    return Entry("!", text, (f"{outcome.status}: {outcome.detail}",))


def _show(console: Console, group: Group) -> None:
    shown = group.entries[:_MAX_LINES] if group.may_be_cut and console.is_terminal else group.entries
    _wrapped(console, f"{group.title}:", "", style="bold")
    for entry in shown:
        text = _few(entry.text) if group.may_be_cut and console.is_terminal else entry.text
        _wrapped(console, text, f"  {entry.sign} ", style=_STYLES[entry.sign])
        for detail in entry.details:
            _wrapped(console, detail, "      ")
    if rest := len(group.entries) - len(shown):
        _wrapped(console, f"... and {rest:,} more; --output json shows all", "    ")
    if group.cure:
        _wrapped(console, group.cure, "    > ")
    line(console, "")


def _few(text: str) -> str:
    """Return a line with at most so many names."""
    names = text.split(", ")
    rest = len(names) - _MAX_NAMES
    return text if rest <= 0 else f"{', '.join(names[:_MAX_NAMES])} and {rest:,} more)"


def _wrapped(console: Console, text: str, prefix: str, style: str = "") -> None:
    """Print a text after a prefix; on a terminal wrapped, with a hanging indent."""
    text = printable(text)
    if not console.is_terminal:
        console.file.write(f"{prefix}{text}\n")
        return
    indent = " " * (len(prefix) if prefix else 0)
    width = max(console.width, 40)
    lines = textwrap.wrap(
        text, width, initial_indent=prefix, subsequent_indent=indent, break_on_hyphens=False
    )
    console.print(Text("\n".join(lines), style=style), soft_wrap=True)


def unbilled_text(unbilled: UnbilledUsage) -> str:
    """Return the unbilled usage in one sentence."""
    subjects = plural(len(unbilled.subjects), "subject")
    text = f"{plural(unbilled.events(), 'event')} of {subjects} without a customer"
    if unbilled.since:
        text += f", since {unbilled.since[:10]}"
    if planned := unbilled.count("planned"):
        text += f"; this plan attributes {planned} of them"
    if blocked := unbilled.count("blocked"):
        text += f"; {blocked} {'is' if blocked == 1 else 'are'} blocked"
        text += f" ({plural(unbilled.events('blocked'), 'event')})"
    if settled := unbilled.count("settled"):
        text += f"; {settled} {'is' if settled == 1 else 'are'} blocked by decision"
        text += f" ({plural(unbilled.events('settled'), 'event')})"
    if unknown := unbilled.count("unknown"):
        text += f"; no source knows {unknown} ({plural(unbilled.events('unknown'), 'event')})"
    return text


def ignored_text(unbilled: UnbilledUsage) -> str:
    """Return the usage that is meant to be unbilled, in one sentence."""
    return "; ".join(
        f"{plural(subject.events, 'event')} of {subject.key} ({subject.reason})"
        for subject in unbilled.ignored
    )


# Markdown


def markdown(plan: Plan) -> str:
    """Return a plan for a pull request."""
    blocks = [f"### syncd plan\n\n{_plain(summary(plan).removeprefix('Plan: '))}"]
    for group in groups_of(plan):
        shown = group.entries[:_MAX_LINES] if group.may_be_cut else group.entries
        listed = "\n".join(_item(entry) for entry in shown)
        if rest := len(group.entries) - len(shown):
            listed += f"\n- ... and {rest:,} more"
        if group.may_be_cut:
            title = f"{_plain(group.title)} ({len(group.entries):,})"
            blocks.append(f"<details><summary>{title}</summary>\n\n{listed}\n\n</details>")
        else:
            cure = f"\n\n> {_plain(group.cure)}" if group.cure else ""
            blocks.append(f"#### {_plain(group.title)}\n\n{listed}{cure}")
    blocks += [f"**Note:** {_plain(note)}." for note in plan.notes]
    if plan.unbilled and plan.unbilled.subjects:
        blocks.append(f"**Unbilled:** {_plain(unbilled_text(plan.unbilled))}.")
    if plan.unbilled and plan.unbilled.ignored:
        blocks.append(f"**Ignored:** {_plain(ignored_text(plan.unbilled))}.")
    return "\n\n".join(blocks) + "\n"


def _item(entry: Entry) -> str:
    more = "".join(f"<br>{_plain(detail)}" for detail in entry.details)
    return f"- `{entry.sign}` {_plain(entry.text)}{more}"


def _plain(text: str) -> str:
    """Return a text that Markdown shows as it is: names are made by others, and would mention or link."""
    escaped = html.escape(printable(text), quote=False)
    return (
        re.sub(r"([\\`*_{}\[\]()#|~!])", r"\\\1", escaped)
        .replace("@", "@<!-- -->")
        .replace("://", ":<!-- -->//")
    )
