"""The section `gateways` of the configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from syncd.config.settings import Config, load
from syncd.core.errors import ConfigError

HEAD = "sources: [{type: declarative-file, path: kong.yml}]\nmetering: {url: 'http://openmeter:8888'}\n"
EAST = "{name: east, url: 'http://10.0.0.1:8096'}"
WEST = "{name: west, url: 'http://10.0.0.2:8096', token: from-the-file}"


def loaded(folder: Path, *gateways: str) -> Config:
    path = folder / "syncd.yaml"
    path.write_text(f"{HEAD}gateways: [{', '.join(gateways)}]\n")
    return load(path)


def tokens(config: Config) -> list[str | None]:
    return [one.token.get_secret_value() if one.token else None for one in config.gateways]


def test_there_are_no_gateways_by_default(tmp_path: Path) -> None:
    (tmp_path / "syncd.yaml").write_text(HEAD)
    assert load(tmp_path / "syncd.yaml").gateways == ()


def test_tokens_can_come_from_the_environment_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tokens(loaded(tmp_path, EAST, WEST)) == [None, "from-the-file"]
    monkeypatch.setenv("SYNCD_GATEWAYS__0__TOKEN", "from-the-environment")
    assert tokens(loaded(tmp_path, EAST, WEST)) == ["from-the-environment", "from-the-file"]
    monkeypatch.setenv("SYNCD_GATEWAYS__1__TOKEN", "another")
    monkeypatch.setenv("SYNCD_SOURCES__0__PATH", "other.yml")
    assert tokens(loaded(tmp_path, EAST, WEST)) == ["from-the-environment", "another"]


def test_a_variable_for_an_unlisted_gateway_is_refused_without_its_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SYNCD_GATEWAYS__1__TOKEN", "hunter2")
    with pytest.raises(ConfigError, match=r"SYNCD_GATEWAYS__1__.*has 1 entry in gateways") as error:
        loaded(tmp_path, EAST)
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize(
    ("gateways", "says"),
    [
        (["{name: east}"], "gateways[0].url"),
        (["{url: 'http://x'}"], "gateways[0].name"),
        (["{name: 'a b', url: 'http://x'}"], "gateways[0].name"),
        (["{name: a, url: 'ftp://x'}"], "gateways[0].url"),
        (["{name: a, url: 'http://me:hunter2@x'}"], "gateways[0].url"),
        (["{name: a, url: 'unix:api'}"], "needs an absolute path"),
        (["{name: a, url: 'http://x', token: ''}"], "gateways[0].token"),
        (['{name: a, url: "http://x", token: "hunter\\n2"}'], "gateways[0].token"),
        (["{name: a, url: 'http://x', timeout: 3}"], "gateways[0].timeout"),
        (["{name: a, url: 'http://x', metering_hosts: ['http://x']}"], "gateways[0].metering_hosts[0]"),
        (["{name: a, url: 'http://x', metering_hosts: ['x:y']}"], "gateways[0].metering_hosts[0]"),
        (["{name: a, url: 'http://x', metering_hosts: ['x/y']}"], "gateways[0].metering_hosts[0]"),
        (["{name: a, url: 'http://x', tokn: hunter2}"], "gateways[0].tokn"),
        ([EAST, "{name: east, url: 'http://y'}"], "two gateways are called east"),
        ([EAST, "{name: again, url: 'http://10.0.0.1:8096/'}"], "http://10.0.0.1:8096 is listed twice"),
    ],
)
def test_an_invalid_setting_is_refused_with_its_name_and_without_its_value(
    tmp_path: Path, gateways: list[str], says: str
) -> None:
    with pytest.raises(ConfigError) as error:
        loaded(tmp_path, *gateways)
    assert says in str(error.value)
    assert "hunter2" not in str(error.value)
