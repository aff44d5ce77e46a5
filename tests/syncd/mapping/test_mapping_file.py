from __future__ import annotations

from pathlib import Path

import pytest

from syncd.core.errors import ConfigError
from syncd.core.model import CustomerDetails
from syncd.mapping.mapping_file import read_mapping_file
from syncd.mapping.rules import Assignment

ACME = CustomerDetails("pay@acme.example", "EUR", "Ask Jane", {"country": "DE"}, {"externalId": "crm-1"})

CSV = """\
kind,id,username,customer,name,email,currency,description,billing_country,metadata.externalId
consumer,1,,acme,ACME,pay@acme.example,EUR,Ask Jane,DE,crm-1
,,Jürgen 日本,globex,,,,,,
"""

YAML = """\
- {kind: consumer, id: "1", customer: acme, name: ACME, email: pay@acme.example, currency: EUR,
   description: Ask Jane, billing_address: {country: DE}, metadata: {externalId: crm-1}}
- {username: Jürgen 日本, customer: globex}
"""


def read(folder: Path, text: str | bytes, name: str = "customers.csv") -> tuple[Assignment, ...]:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_mapping_file(path)


def test_csv_and_yaml_are_equivalent(tmp_path: Path) -> None:
    first, second = read(tmp_path, CSV)
    assert (first.kind, first.id, first.customer, first.name) == ("consumer", "1", "acme", "ACME")
    assert first.details == ACME
    assert (second.kind, second.username, second.customer) == ("consumer", "Jürgen 日本", "globex")
    from_yaml = read(tmp_path, YAML, "customers.yaml")
    assert [(row.id, row.username, row.customer, row.details) for row in from_yaml] == [
        (row.id, row.username, row.customer, row.details) for row in (first, second)
    ]


def test_a_file_saved_by_a_spreadsheet_is_read(tmp_path: Path) -> None:
    (row,) = read(tmp_path, b'\xef\xbb\xbfusername,customer\r\n"a, b", acme \r\n')
    assert (row.username, row.customer) == ("a, b", "acme")
    (row,) = read(tmp_path, b"username,customer,\r\na,acme,\r\n")
    assert row.customer == "acme", "an empty last column"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("id,customer\n1,a\n1,b\n", "line 2 and customers.csv line 3 are both about consumer 1"),
        ("id,custmer\n1,a\n", "line 1: unknown column 'custmer'; did you mean 'customer'"),
        ("id,customer,customer\n1,a,b\n", "line 1: column 'customer' is there twice"),
        ("id,billing_planet\n1,x\n", "unknown column"),
        ("customer\nacme\n", "names no principal"),
        ("kind,id\nrobot,1\n", "robot"),
        ("id,customer\n1\n", "number of fields differs"),
        ("id,customer\n1,a,b\n", "number of fields differs"),
        ('id,customer\n"1,a\n', "customers.csv line"),
        ("id,metadata.sync-owner\n1,x\n", "reserved for syncd's own metadata"),
        (b"id\n\xff\n", "not UTF-8"),
    ],
)
def test_an_invalid_row_is_refused_with_its_line(tmp_path: Path, text: str | bytes, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        read(tmp_path, text)


@pytest.mark.parametrize("text", ["a: 1", "- 1", "- {id: [1]}", "- {id: 1, id: 2}", "- id: 1\n---\n", "{"])
def test_a_yaml_file_that_is_not_a_list_of_mappings_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"customers\.yaml"):
        read(tmp_path, text, "customers.yaml")


def test_the_values_of_a_yaml_file_keep_their_text(tmp_path: Path) -> None:
    rows = read(
        tmp_path,
        """\
- username: alice
  customer: 0017
  billing_address: {country: NO, postal_code: 02134, phone_number: 0151234567}
- {username: 0123, customer: 1_000}
- {username: 12:30, customer: 0x1F}
- {username: true, customer: 2024-02-30}
- {username: 1.0, customer: ~}
""",
        "customers.yaml",
    )
    assert [(row.username, row.customer) for row in rows] == [
        ("alice", "0017"),
        ("0123", "1_000"),
        ("12:30", "0x1F"),
        ("true", "2024-02-30"),
        ("1.0", None),
    ]
    assert rows[0].details.billing_address == {
        "country": "NO",
        "postal_code": "02134",
        "phone_number": "0151234567",
    }


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_a_csv_file_with_another_delimiter_is_read(tmp_path: Path, delimiter: str) -> None:
    text = "username;customer;name\nalice;acme;ACME, Inc.\n".replace(";", delimiter)
    (row,) = read(tmp_path, text)
    assert (row.username, row.customer, row.name) == ("alice", "acme", "ACME, Inc.")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.csv"):
        read_mapping_file(tmp_path / "gone.csv")
