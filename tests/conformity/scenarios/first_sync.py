"""Customers are created: after a kill, with odd names, over another dialect, after a deletion."""

from __future__ import annotations

import json
import signal
import subprocess
from dataclasses import dataclass, field
from urllib.parse import urlencode

import httpx

from syncd.core.errors import BlockedError
from syncd.metering.base import CustomerEdit
from tests.conformity.stage import APPLIED, DRIFT, IN_SYNC, NotOffered, Stage, expect
from tests.syncd.processes import command
from tests.syncd.servers import Answer, Asked, serving

_UNTIL_KILLED = 12  # more than guards.min_changes
_CONSUMERS = 25
_ODD = (
    "a b",
    "a/b",
    "a%2Fb",
    "100%",
    "ünï-日本",
    "q?x=1&y=2#z",
    "a+b",
    'it\'s "so"',
    "d/../e",
    "c:\\d",
    "é",
    "x" * 180,
)


@dataclass
class Killing:
    """Passes requests on, and kills syncd as soon as it has created so many customers."""

    upstream: str
    token: str | None
    process: subprocess.Popen[bytes] | None = None
    created: list[str] = field(default_factory=list)

    def __call__(self, asked: Asked) -> Answer:
        query = f"?{urlencode(asked.query)}" if asked.query else ""
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        if asked.body is not None:
            headers["Content-Type"] = "application/json"
        content = None if asked.body is None else json.dumps(asked.body).encode()
        url = f"{self.upstream}{asked.path}{query}"
        answer = httpx.request(asked.method, url, headers=headers, content=content, timeout=30)
        if asked.method == "POST" and asked.path.endswith("/customers") and answer.is_success:
            self.created.append(answer.json()["key"])
            if len(self.created) == _UNTIL_KILLED and self.process:
                self.process.send_signal(signal.SIGKILL)
                return Answer(cut=True)
        content_type = {"Content-Type": answer.headers.get("content-type", "application/json")}
        return Answer(answer.content, answer.status_code, content_type)


def _interrupted(stage: Stage) -> list[str]:
    """Kill a first sync amid its creations; return the usernames of all consumers."""
    usernames = stage.users(*(f"{number:02}" for number in range(_CONSUMERS)))
    killing = Killing(stage.server.url, stage.token)
    with serving(killing) as proxy:
        url = stage.server.metering_url(stage.dialect).replace(stage.server.url, proxy.url)
        stage.configure(metering={"url": url, "concurrency": 1})
        environment = stage.project.environment()
        with subprocess.Popen(
            command("apply", "--yes"),
            cwd=stage.folder,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as process:
            killing.process = process
            try:
                status = process.wait(120)
            finally:
                process.kill()
        expect(status == -signal.SIGKILL, f"syncd created {len(killing.created)} customers")
    return usernames


def _display_names(stage: Stage, usernames: list[str]) -> set[object]:
    entities = stage.server.entities()
    return {entities.get(username, {}).get("displayName") for username in usernames}


def a_first_sync_that_was_killed_goes_on(stage: Stage) -> None:
    usernames = _interrupted(stage)
    stage.configure()
    stage.syncd("apply", "--yes", ends_with=APPLIED)
    there = set(stage.customers())
    expect(there == set(usernames), f"{len(there)} of {len(usernames)} customers are there")
    stage.syncd("plan", ends_with=IN_SYNC)


def with_policy_create_only_it_names_every_subject(stage: Stage) -> None:
    if stage.dialect != "openmeter-v1" or not stage.server.entities():
        raise NotOffered("there are no subject entities")
    usernames = _interrupted(stage)
    stage.configure(policy="create-only")
    stage.syncd("apply", "--yes", ends_with=APPLIED)
    shown = _display_names(stage, usernames)
    expect(shown == set(usernames), f"{len(shown & set(usernames))} of {len(usernames)} subjects have a name")
    stage.syncd("plan", ends_with=IN_SYNC)


def the_other_dialect_takes_over(stage: Stage) -> None:
    if len(stage.server.spoken) < 2:
        raise NotOffered("the server speaks one dialect only")
    usernames = stage.users(*(f"{number:02}" for number in range(_UNTIL_KILLED)))
    [other] = [dialect for dialect in stage.server.spoken if dialect != stage.dialect]
    stage.configure(metering={"dialect": other, "url": stage.server.metering_url(other)})
    stage.syncd("apply", "--yes", ends_with=APPLIED)
    before = {key: each["id"] for key, each in stage.customers().items()}
    stage.configure()
    stage.syncd("apply", "--yes", ends_with=APPLIED)
    after = {key: each["id"] for key, each in stage.customers().items()}
    expect(before == after and set(after) == set(usernames), f"customers {before} became {after}")
    stage.syncd("plan", ends_with=IN_SYNC)


def odd_keys_and_subjects_come_back_as_they_were_sent(stage: Stage) -> None:
    usernames = stage.users(*_ODD)
    stage.syncd("apply", "--yes", ends_with=APPLIED)
    subjects = {
        key: (each.get("usageAttribution") or each["usage_attribution"])
        for key, each in stage.customers().items()
    }
    seen = {key: next(iter(each.values())) for key, each in subjects.items()}
    wanted = {username: [username] for username in usernames}
    expect(
        seen == wanted,
        f"missing {sorted(set(wanted) - set(seen))}, changed {sorted(set(seen) - set(wanted))}",
    )
    stage.syncd("plan", ends_with=IN_SYNC)
    with stage.client() as api:
        reachable = [username for username in usernames if ".." not in username]
        for username in reachable:
            found = api.customer_by_key(username)
            expect(found and found.key == username, f"the key {username!r} finds {found}")
            assert found is not None
            expect(
                api.edit_customer(found.id, lambda _: CustomerEdit(name="renamed")),
                f"{username!r} cannot be renamed",
            )
    changes = stage.plan()["changes"]
    expect({change["customer_key"] for change in changes} == set(reachable), f"the plan has {changes!r:.300}")


def every_page_is_read_to_the_end(stage: Stage) -> None:
    usernames = stage.users(*(f"{number:02}" for number in range(23)))
    stage.syncd("apply", "--yes", ends_with=APPLIED)
    with stage.client() as api:
        pages = [api.find_customers("key", stage.name, page, 10) for page in (1, 2, 3, 4)]
        observed = {customer.key for customer in api.observe().customers}
        counted = api.count_customers()
    keys = [customer.key for page in pages for customer in page.customers]
    expect(
        [len(page.customers) for page in pages] == [10, 10, 3, 0],
        f"pages of {[len(p.customers) for p in pages]}",
    )
    expect(sorted(map(str, keys)) == sorted(usernames), "pages repeat or leave out customers")
    expect({page.total for page in pages} <= {23, None}, f"totals {[page.total for page in pages]}")
    expect(set(usernames) <= observed, f"{len(set(usernames) - observed)} of 23 are not observed")
    expect(counted is None or counted >= len(observed), f"{counted} counted, {len(observed)} observed")


def a_deleted_customer_is_created_anew(stage: Stage) -> None:
    [username] = stage.users("again")
    stage.syncd("apply", "--yes", ends_with=APPLIED)
    first = stage.customers()[username]["id"]
    why = stage.server.delete_customer(first)
    expect(why is None, f"the deletion by hand was refused: {why}")
    stage.syncd("plan", ends_with=DRIFT)
    stage.syncd("apply", "--yes", ends_with=APPLIED)
    second = stage.customers()[username]["id"]
    expect(second != first, "the deleted customer came back")
    with stage.client() as api:
        expect(not api.delete_customer(first, lambda _: None), "a second deletion deletes something")
        expect(api.inspect(first) is None, "a deleted customer can be inspected")
        found = api.customer_by_key(username)
        expect(found and found.id == second, f"the key finds {found}")
        try:
            api.edit_customer(first, lambda _: CustomerEdit(name="new"))
        except BlockedError:
            pass
        else:
            expect(False, "a deleted customer can be edited")
    expect(stage.customers()[username]["name"] == username, "the new customer was edited")


SCENARIOS = (
    a_first_sync_that_was_killed_goes_on,
    with_policy_create_only_it_names_every_subject,
    the_other_dialect_takes_over,
    odd_keys_and_subjects_come_back_as_they_were_sent,
    every_page_is_read_to_the_end,
    a_deleted_customer_is_created_anew,
)
