"""Settings of one sandbox."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Settings:
    """The options of `syncd sandbox`, as `serve` describes them."""

    db: Path
    token: str | None = None
    subjects: bool = True
    max_subjects_per_customer: int | None = None
    dedupe: bool = True
    flush_seconds: float = 0
    provision_subjects: bool = True
