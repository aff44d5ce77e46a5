"""The spool: a queue of segment files on disk for each destination, with its format, writer and reader.

Workers write here before Kong gets its answer; the delivery process reads.

Start with `segment` (the format and its invariants), then `writer` and `reader`.
May import: no other room.
"""
