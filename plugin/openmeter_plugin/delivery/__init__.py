"""Delivery: POSTs the spool's events to the metering API, each exactly once in effect.

Each spool has one delivery process: `process` takes the lock, and `spool_delivery` starts a `queue_delivery`
for each queue. Its `pipeline` reads batches, posts them through an `endpoint` and commits the outcome to the
books.

Start with `pipeline`, then `endpoint`.
May import: `books`, `metering`, `spool`.
"""
