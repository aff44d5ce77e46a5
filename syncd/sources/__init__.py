"""Sources: where principals come from. Each reads everything or raises SourceError, never a smaller world."""

from syncd.sources.base import Source

__all__ = ["Source"]
