"""The probes of the overview, over real HTTP."""

from __future__ import annotations

from pathlib import Path

import pytest

from syncd.config import settings
from syncd.core.errors import SourceError
from syncd.dashboard.health import source_probes
from tests.syncd.servers import Answer, Asked, serving


def probed(folder: Path, url: str) -> str:
    config = folder / "syncd.yaml"
    source = f"{{type: kong-admin, url: '{url}', workspace: team-a}}"
    config.write_text(f"sources: [{source}]\nmetering: {{url: 'http://127.0.0.1:9'}}\n")
    (probe,) = source_probes(settings.load(config))
    return probe.check()


def test_a_workspace_on_an_open_source_kong_is_named_as_the_cause(tmp_path: Path) -> None:
    answer = Answer({"message": "Not found"}, 404)
    with serving(lambda _: answer) as kong, pytest.raises(SourceError) as error:
        probed(tmp_path, kong.url)
    assert "has no workspace 'team-a'" in str(error.value)
    assert "Gateway Enterprise" in str(error.value)


def test_a_token_that_may_not_read_the_status_shows_as_able_to_read_consumers(tmp_path: Path) -> None:
    def rbac(asked: Asked) -> Answer:
        return Answer({"data": [{"id": "1"}]}) if asked.path == "/team-a/consumers" else Answer({}, 403)

    with serving(rbac) as kong:
        assert probed(tmp_path, kong.url) == "consumers can be read"
