"""Lists paged by number that change during the read: the result is complete, or an error."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from syncd.core.errors import MalformedError, RefusedError
from syncd.http.pagination import Entry, Page, read_all


def entry(number: int) -> Entry:
    minutes, seconds = divmod(number, 60)
    return {"id": str(number), "created_at": f"2026-01-01T00:{minutes:02}:{seconds:02}Z"}


class Server:
    """A list in order of creation; `between` may change it before each request."""

    def __init__(self, count: int, between: Callable[[Server, int], None] = lambda _server, _request: None):
        self.entries = [entry(number) for number in range(count)]
        self.next = count
        self.requests = 0
        self.between = between

    def add(self) -> None:
        self.entries.append(entry(self.next))
        self.next += 1

    def fetch(self, number: int, size: int) -> Page:
        self.requests += 1
        self.between(self, self.requests)
        size = 2 if size > 1 else 1  # syncd asks for 1000, too many for a test
        return Page(self.entries[(number - 1) * size : number * size], len(self.entries))

    def read(self) -> list[str]:
        return [str(found["id"]) for found in read_all(self.fetch, "the list", created="created_at")]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 9])
def test_an_unchanging_list_is_read_once_and_completely(count: int) -> None:
    server = Server(count)
    assert server.read() == [str(number) for number in range(count)]
    pages = max(1, -(-count // 2))
    assert server.requests == pages + 2 * (pages > 1)


def test_a_deletion_that_shifts_a_page_causes_another_read() -> None:
    def delete(server: Server, request: int) -> None:
        if request == 4:
            del server.entries[0]

    assert Server(6, delete).read() == ["1", "2", "3", "4", "5"]


def test_a_deletion_and_an_addition_at_once_do_not_hide_another_entry() -> None:
    # The total stays and each page is full: only the youngest entry reveals the change.
    def swap(server: Server, request: int) -> None:
        if request == 4:
            del server.entries[0]
            server.add()

    assert Server(6, swap).read() == ["1", "2", "3", "4", "5", "6"]


def test_a_changing_order_causes_another_read() -> None:
    def shuffle(server: Server, request: int) -> None:
        if request == 4:
            server.entries[1], server.entries[2] = server.entries[2], server.entries[1]

    assert sorted(Server(6, shuffle).read()) == ["0", "1", "2", "3", "4", "5"]


def test_a_list_that_keeps_changing_is_an_error_and_not_a_shorter_list() -> None:
    def grow(server: Server, _request: int) -> None:
        server.add()

    with pytest.raises(MalformedError, match="the list changed during each of 3 readings"):
        Server(6, grow).read()


def test_an_empty_page_before_the_end_is_not_the_end() -> None:
    with pytest.raises(MalformedError, match="changed"):
        read_all(lambda number, _: Page([entry(0)] if number == 1 else [], 2), "x", created="created_at")


def test_a_list_that_does_not_say_how_long_it_is_is_an_error() -> None:
    with pytest.raises(MalformedError, match="how many"):
        read_all(lambda _number, _size: Page([entry(0)], None), "x", created="created_at")


def test_an_entry_without_id_is_an_error() -> None:
    with pytest.raises(MalformedError, match="no id"):
        read_all(lambda _number, _size: Page([{}], 1), "x", created="created_at")


def test_a_server_that_refuses_large_pages_is_asked_for_smaller_ones() -> None:
    sizes: list[int] = []

    def fetch(_number: int, size: int) -> Page:
        sizes.append(size)
        if size > 100:
            raise RefusedError("too large", status=400, detail="page size")
        return Page([entry(0)], 1)

    assert len(read_all(fetch, "x", created="created_at")) == 1
    assert sizes == [1000, 100]


def test_without_readable_times_only_the_total_is_checked() -> None:
    def fetch(number: int, size: int) -> Page:
        names = ["a", "b"] if size > 1 and number == 1 else ["c"]
        return Page([{"id": name, "created_at": 7} for name in names], 3)

    assert len(read_all(fetch, "x", created="created_at")) == 3


@example(3, {2: [None, 0]})
@given(
    st.integers(0, 9),
    st.dictionaries(st.integers(1, 12), st.lists(st.one_of(st.none(), st.integers(0, 9)), max_size=3)),
)
def test_entries_that_stay_during_the_read_are_never_missed(
    count: int, script: dict[int, list[int | None]]
) -> None:
    """None adds an entry, a number deletes the one at that position."""

    def change(server: Server, request: int) -> None:
        for step in script.get(request, []):
            if step is None:
                server.add()
            elif step < len(server.entries):
                del server.entries[step]

    server = Server(count, change)
    before = {str(found["id"]) for found in server.entries}
    try:
        found = set(server.read())
    except MalformedError:
        return
    stayed = before & {str(found["id"]) for found in server.entries}
    assert stayed <= found


@pytest.mark.parametrize("total", [1, 2], ids=["more than it says", "one entry twice"])
def test_a_single_page_that_contradicts_its_total_is_rejected(total: int) -> None:
    twice = [entry(0), entry(0)] if total == 2 else [entry(0), entry(1)]
    with pytest.raises(MalformedError, match="the list changed during each of 3 readings"):
        read_all(lambda _number, _size: Page(twice, total), "the list", created="created_at")


def test_a_list_that_shrank_while_its_youngest_was_asked_for_is_read_again() -> None:
    """Without the youngest entry, a deletion and an addition at once would hide another entry."""

    def change(server: Server, request: int) -> None:
        if request in (2, 4):
            del server.entries[0]
        if request in (3, 4):
            server.add()

    assert Server(6, change).read() == ["2", "3", "4", "5", "6", "7"]


def test_without_times_a_changed_total_causes_another_read() -> None:
    def change(server: Server, request: int) -> None:
        for one in server.entries:
            one.pop("created_at", None)
        if request == 4:
            del server.entries[0]
        if request == 5:
            server.add()
            server.add()

    assert Server(4, change).read() == ["1", "2", "3", "4", "5"]
