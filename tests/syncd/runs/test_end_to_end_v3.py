"""Plan, apply and plan again through the command line, in dialect v3."""

from __future__ import annotations

import json
from pathlib import Path

import httpx

from syncd.sandbox.testing import running_sandbox
from tests.syncd.konnect import PORTAL, Konnect, application, registration, uid
from tests.syncd.processes import KONG_YML, Project
from tests.syncd.servers import serving

SETTINGS = """
sources:
- {{type: declarative-file, path: kong.yml}}
- {{type: konnect-applications, url: "{konnect}", portal_id: "{portal}"}}
metering: {{dialect: openmeter-v3, url: "{url}", attempts: 1}}
mapping:
  file: customers.csv
  create: {{currency: EUR, metadata: {{externalId: "{{username}}@x"}}}}
"""


def test_a_first_sync_over_v3_creates_what_the_second_finds_in_order(tmp_path: Path) -> None:
    konnect = Konnect([application(1)], [registration(1, "app-1", "dora")])
    with running_sandbox() as url, serving(konnect) as portal:
        project = Project(tmp_path, url)
        (tmp_path / "kong.yml").write_text(KONG_YML)
        (tmp_path / "customers.csv").write_text("username,email\ncarol,carol@x.example\n")
        project.config.write_text(SETTINGS.format(konnect=portal.url, portal=PORTAL, url=url))
        planned = project.call("plan", "--output=json")
        assert planned.returncode == 2, planned.stderr
        notes = json.loads(planned.stdout)["notes"]
        assert any("externalId" in note and "label rules" in note for note in notes)
        applied = project.call("apply", "--yes")
        assert applied.returncode == 0, applied.stderr
        assert project.call("plan").returncode == 0
        made = {item["name"]: item for item in httpx.get(f"{url}/api/v1/customers").json()["items"]}
        assert made.keys() == {"acme", "carol", "app-1"}
        assert (made["carol"]["primaryEmail"], made["carol"]["currency"]) == ("carol@x.example", "EUR")
        assert made["app-1"]["usageAttribution"]["subjectKeys"] == [
            f"app:{uid('app-1')}",
            f"consumer:{uid('dora')}",
        ]
