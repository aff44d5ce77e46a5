"""What delivery is measured against: the spool's events posted by nothing but httpx, batch after batch.

The batches are made before the clock that matters to a peer would start, but here the whole process is
timed, as our delivery is; reading a file and cutting it up is the least that any delivery must do.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import httpx

from openmeter_plugin.spool.reader import read_segment
from openmeter_plugin.spool.segment import EVENTS, Record


async def post(spool: Path, endpoint: str, batch_size: int) -> None:
    """Post every event of the spool."""
    headers = {"content-type": "application/cloudevents-batch+json"}
    segments = sorted(spool.glob("queues/*/*.seg"))  # noqa: ASYNC240 - nothing else runs here
    async with httpx.AsyncClient(headers=headers, trust_env=False) as client:
        batch: list[bytes] = []
        for path in segments:
            for item in read_segment(path):
                if isinstance(item, Record) and item.kind == EVENTS:
                    batch.append(item.events)
                if len(batch) == batch_size:
                    (await client.post(endpoint, content=b"[" + b",".join(batch) + b"]")).raise_for_status()
                    batch = []
        if batch:
            (await client.post(endpoint, content=b"[" + b",".join(batch) + b"]")).raise_for_status()


if __name__ == "__main__":
    asyncio.run(post(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
