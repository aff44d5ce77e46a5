"""What can be checked of a configuration without the network: the files that it names."""

from __future__ import annotations

from dataclasses import dataclass

from syncd.config.settings import Config
from syncd.core.model import Principal
from syncd.mapping.desired_state import desired_state
from syncd.runs.factory import rules_of, sources_of
from syncd.sources.files import ApplicationsFile, DeclarativeFile, Static

_LOCAL = (DeclarativeFile, ApplicationsFile, Static)


@dataclass(frozen=True, slots=True)
class Checked:
    """The number of principals that local sources have, and what a person should know."""

    principals: int
    notes: tuple[str, ...]


def examine_files(config: Config) -> Checked:
    """Read the mapping file and the local sources; raises ConfigError or SourceError.

    Only if all sources are local can rows of the mapping file that match no principal be told.
    """
    config.notify.check()
    rules = rules_of(config)
    principals: list[Principal] = []
    remote: list[str] = []
    for source in sources_of(config):
        if isinstance(source, _LOCAL):
            principals += source.read()
        else:
            remote.append(source.name)
    notes: list[str] = []
    if remote:
        notes.append(f"not read, because that needs the network: {', '.join(remote)}")
    else:
        desired = desired_state(principals, rules)
        notes += [*desired.warnings, *(problem.reason for problem in desired.problems)]
    return Checked(len(principals), tuple(notes))
