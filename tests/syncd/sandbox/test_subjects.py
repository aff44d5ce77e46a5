"""/api/v1/subjects."""

import httpx

from syncd.sandbox.testing import running_sandbox
from tests.syncd.sandbox.support import ok, refused


def test_subjects_are_created_and_listed(api: httpx.Client) -> None:
    sent = [{"key": "b", "displayName": "Bob"}, {"key": "a", "metadata": {"crm": 7}}]
    response = api.post("/api/v1/subjects", json=sent)
    assert response.status_code == 200
    made = response.json()
    assert [(subject["key"], len(subject["id"])) for subject in made] == [("b", 26), ("a", 26)]
    assert made[0]["displayName"] == "Bob"
    assert made[1]["metadata"] == {"crm": 7}
    assert ok(api.get("/api/v1/subjects")) == [made[1], made[0]]


def test_an_upsert_changes_only_what_it_names_and_null_clears(api: httpx.Client) -> None:
    [made] = ok(api.post("/api/v1/subjects", json=[{"key": "a", "displayName": "A", "metadata": {"x": 1}}]))
    [changed] = ok(api.post("/api/v1/subjects", json=[{"key": "a", "displayName": None}]))
    assert "displayName" not in changed
    assert (changed["id"], changed["createdAt"]) == (made["id"], made["createdAt"])
    assert changed["metadata"] == {"x": 1}


def test_a_subject_is_found_and_deleted_by_key_or_id(api: httpx.Client) -> None:
    first, second = ok(api.post("/api/v1/subjects", json=[{"key": "a/b"}, {"key": "c"}]))
    assert ok(api.get("/api/v1/subjects/a%2Fb")) == first
    assert api.delete(f"/api/v1/subjects/{second['id']}").status_code == 204
    assert ok(api.get("/api/v1/subjects")) == [first]
    assert "c not found" in refused(api.get("/api/v1/subjects/c"), 404)
    refused(api.delete("/api/v1/subjects/c"), 404)


def test_subjects_come_as_a_list(api: httpx.Client) -> None:
    refused(api.post("/api/v1/subjects", json={"key": "a"}), 400)


def test_a_newer_server_has_no_subjects() -> None:
    with running_sandbox(subjects=False) as url, httpx.Client(base_url=url) as api:
        refused(api.get("/api/v1/subjects"), 404)
        refused(api.post("/api/v1/subjects", json=[{"key": "a"}]), 404)
        refused(api.delete("/api/v1/subjects/a"), 404)
