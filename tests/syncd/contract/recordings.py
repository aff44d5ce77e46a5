"""The recordings of a real OpenMeter: tests/data/om-wire, whose README says where they come from."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "data" / "om-wire"

V1 = "/api/v1"
V3 = "/api/v3/openmeter"


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request and the answer of the real server. Bodies are decoded JSON, raw text, or None."""

    file: str
    name: str
    method: str
    path: str
    headers: Mapping[str, str]
    body: Any
    status: int
    answer_headers: Mapping[str, str]
    answer: Any

    def __str__(self) -> str:
        return f"{self.file}/{self.name}"

    def content(self) -> str:
        """Return the request's body as text."""
        if self.body is None:
            return ""
        return self.body if isinstance(self.body, str) else json.dumps(self.body)


def exchanges(file: str) -> list[Exchange]:
    """Read the exchanges of one file, in order."""
    lines = (FOLDER / f"{file}.jsonl").read_text(encoding="utf-8").splitlines()
    return [_exchange(file, json.loads(line)) for line in lines]


def _exchange(file: str, line: dict[str, Any]) -> Exchange:
    request, response = line["request"], line["response"]
    return Exchange(
        file=file,
        name=line["name"],
        method=request["method"],
        path=request["path"],
        headers=request["headers"],
        body=request["body"],
        status=response["status"],
        answer_headers=response["headers"],
        answer=response["body"],
    )
