"""/api/v1/subjects."""

import httpx

from syncd.sandbox.testing import running_sandbox
from tests.syncd.sandbox.support import create_customer, ok, refused


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
    assert "subject not found" in refused(api.get("/api/v1/subjects/c"), 404)
    refused(api.delete("/api/v1/subjects/c"), 404)


def test_the_server_makes_the_entities_of_a_customers_subjects(api: httpx.Client) -> None:
    customer = create_customer(api, key="k", subjects=["a", "b"])
    assert {entity["key"]: entity["metadata"] for entity in ok(api.get("/api/v1/subjects"))} == {
        key: {"createdBy": "subject.provisioner", "customerId": customer["id"]} for key in ("a", "b")
    }


def test_the_server_leaves_an_entity_that_is_there_and_makes_one_that_was_deleted_again(
    api: httpx.Client,
) -> None:
    [named] = ok(api.post("/api/v1/subjects", json=[{"key": "a", "displayName": "A"}]))
    create_customer(api, key="k", subjects=["a", "b"])
    assert ok(api.get("/api/v1/subjects/a")) == named
    api.delete("/api/v1/subjects/b")
    body = {"name": "Alice", "key": "k", "usageAttribution": {"subjectKeys": ["a", "b"]}}
    ok(api.put("/api/v1/customers/k", json=body))
    ok(api.get("/api/v1/subjects/b"))


def test_the_server_removes_no_entity(api: httpx.Client) -> None:
    create_customer(api, key="k", subjects=["a"])
    ok(api.put("/api/v1/customers/k", json={"name": "Alice", "key": "k"}))
    api.delete("/api/v1/customers/k")
    ok(api.get("/api/v1/subjects/a"))


def test_subjects_come_as_a_list(api: httpx.Client) -> None:
    refused(api.post("/api/v1/subjects", json={"key": "a"}), 400)


def test_a_newer_server_has_no_subjects() -> None:
    with running_sandbox(subjects=False) as url, httpx.Client(base_url=url) as api:
        refused(api.get("/api/v1/subjects"), 404)
        refused(api.post("/api/v1/subjects", json=[{"key": "a"}]), 404)
        refused(api.delete("/api/v1/subjects/a"), 404)
