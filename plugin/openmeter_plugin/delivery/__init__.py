"""Delivery: POSTs the spool's events to the metering API, each exactly once in effect.

Each spool has one delivery process: `process` takes the lock, and starts a `queue_delivery` for each queue.
Its `pipeline` reads batches, hands them to the queue's `endpoint` and commits the outcome to the books. The
endpoint decides when to post and what becomes of a refused event; its `client` posts over a `transport`, and
`answers` says what an answer means.

Start with `pipeline`, then `endpoint`.
May import: `books`, `spool`, `network`.
"""
