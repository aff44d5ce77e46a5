"""Helpers for writer tests: records with a number in them."""

from __future__ import annotations

from openmeter_plugin.spool.segment import SKIPPED, encode_record
from openmeter_plugin.spool.writer import SpoolWriter
from tests.plugin.spools import QUEUE


def payload(number: int) -> bytes:
    return SKIPPED + b"record %06d" % number


def record(number: int) -> bytes:
    return encode_record(payload(number))


SIZE = len(record(0))


def hand_over(writer: SpoolWriter, numbers: range, queue: str = QUEUE) -> None:
    for number in numbers:
        writer.append(writer.queue(queue), record(number), number)
