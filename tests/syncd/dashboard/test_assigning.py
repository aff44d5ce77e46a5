"""Rows that the dashboard writes into the mapping file: whole or not at all."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from openmeter_plugin.metering.rules import SubjectPrefixes
from syncd.core.errors import ConfigError
from syncd.dashboard.assigning import Who, append_row, row_text, who_of
from syncd.mapping.mapping_file import read_mapping_file

ROW = {"kind": "consumer", "id": "c-1", "customer": "acme, inc"}


def mapping(
    folder: Path, text: str = "kind,id,username,customer\n,c-0,,globex\n", name: str = "m.csv"
) -> Path:
    path = folder / name
    path.write_bytes(text.encode())
    return path


@pytest.mark.parametrize(
    ("subject", "field", "found"),
    [
        ("consumer:1", "id", Who("consumer", "1", None)),
        ("app:1", "id", Who("application", "1", None)),
        ("alice", "username", Who("consumer", None, "alice")),
        ("alice", "custom_id", None),
        ("consumer:", "id", None),
        ("", "username", None),
    ],
)
def test_the_principal_is_what_the_subject_says(subject: str, field: str, found: Who | None) -> None:
    assert who_of(subject, field, SubjectPrefixes()) == found


@pytest.mark.parametrize(
    ("text", "added"),
    [
        ("kind,id,username,customer\n,c-0,,globex\n", 'consumer,c-1,,"acme, inc"\n'),
        ("id;customer\nc-0;globex", "c-1;acme, inc\n"),
        ("\ufeffcustomer\tname\tid\r\nglobex\tG\tc-0\r\n", "acme, inc\t\tc-1\r\n"),
    ],
)
def test_a_row_is_appended_in_the_files_own_form(tmp_path: Path, text: str, added: str) -> None:
    path = mapping(tmp_path, text)
    path.chmod(0o640)
    append_row(ROW, path)
    written = path.read_bytes().decode()
    assert written.startswith(text)
    assert written.endswith(added)
    assert path.stat().st_mode & 0o777 == 0o640
    assert [(one.id, one.customer) for one in read_mapping_file(path)] == [
        ("c-0", "globex"),
        ("c-1", "acme, inc"),
    ]
    assert row_text(ROW, path) == added.replace("\r\n", "\n")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("text", "name", "problem"),
    [
        ("kind,id,customer\n,c-1,globex\n", "m.csv", "both about consumer c-1"),
        ("kind,username,customer\n", "m.csv", "no column 'id'"),
        ("- {id: c-0}\n", "m.yaml", "no CSV file"),
        ("id,customer\nc-0\n", "m.csv", "number of fields"),
    ],
)
def test_a_row_that_does_not_fit_leaves_the_file_as_it_was(
    tmp_path: Path, text: str, name: str, problem: str
) -> None:
    path = mapping(tmp_path, text, name)
    with pytest.raises(ConfigError, match=problem):
        append_row(ROW, path)
    assert path.read_text() == text
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    real = mapping(tmp_path, name="real.csv")
    link = tmp_path / "m.csv"
    link.symlink_to(real)
    append_row(ROW, link)
    assert link.is_symlink()
    assert len(read_mapping_file(real)) == 2


def test_rows_that_are_written_at_once_are_all_there(tmp_path: Path) -> None:
    path = mapping(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: append_row({**ROW, "id": f"x-{n}"}, path), range(20)))
    assert len(read_mapping_file(path)) == 21


def test_an_entry_of_yaml_is_shown_as_it_is_pasted(tmp_path: Path) -> None:
    path = mapping(tmp_path, "- {id: c-0, customer: globex}\n", "m.yaml")
    shown = row_text(ROW, path)
    path.write_text(path.read_text() + shown)
    assert [one.customer for one in read_mapping_file(path)] == ["globex", "acme, inc"]
