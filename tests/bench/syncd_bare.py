"""What syncd is measured against: the same requests sent by nothing but httpx, and the answers parsed.

    python -m tests.bench.syncd_bare read URL
    python -m tests.bench.syncd_bare create URL COUNT CONCURRENCY

Nothing is done with what comes back, but it is kept, as whoever compares two lists has to. `read` prints the
seconds that it took, without the start of Python.
"""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx

from tests.bench.syncd_apis import PAGE, body


def read(url: str) -> int:
    """Page through both lists, the way their APIs are paged, and return how many entries there are."""
    consumers: list[object] = []
    customers: list[object] = []
    with httpx.Client(base_url=url, trust_env=False) as client:
        offset: dict[str, str | int] = {}
        while True:
            page = client.get("/kong/consumers", params={"size": PAGE, **offset}).json()
            consumers += page["data"]
            if not page.get("offset"):
                break
            offset = {"offset": page["offset"]}
        number, total = 1, 1
        while len(customers) < total:
            page = client.get("/api/v1/customers", params={"page": number, "pageSize": PAGE}).json()
            customers += page["items"]
            number, total = number + 1, page["totalCount"]
    return len(consumers) + len(customers)


def create(url: str, count: int, concurrency: int) -> None:
    """Create so many customers, that many at once."""
    bodies = [body(number) for number in range(count)]

    def several(first: int) -> None:
        # A client for each thread: what threads share may be closed under them (encode/httpcore#1110).
        with httpx.Client(base_url=url, trust_env=False) as client:
            for made in bodies[first::concurrency]:
                client.post("/api/v1/customers", json=made).raise_for_status()

    with ThreadPoolExecutor(concurrency) as pool:
        for _ in pool.map(several, range(concurrency)):
            pass


if __name__ == "__main__":
    what, where, *numbers = sys.argv[1:]
    if what == "read":
        started = time.perf_counter()
        assert read(where) > 0
        print(time.perf_counter() - started)
    else:
        create(where, *map(int, numbers))
