"""The spool: segment files on disk, from the record format to the writer and the reader.

Start with `segment` (the format and its invariants), then `writer` and `reader`.
May import: the package root.
"""
