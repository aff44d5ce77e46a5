"""Base classes of request bodies: OpenMeter's are validated as by its OpenAPI validator."""

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic.alias_generators import to_camel

Metadata = dict[str, str]


class SandboxBody(BaseModel):
    """A body of the sandbox's own routes: snake_case, unknown properties refused."""

    model_config = ConfigDict(extra="forbid")


class Body(BaseModel):
    """A body of OpenMeter: camelCase, strictly typed, unknown properties ignored, rarely nullable."""

    model_config = ConfigDict(strict=True, extra="ignore", alias_generator=to_camel)

    nullable: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _refuse_nulls(cls, data: Any) -> Any:
        names = {to_camel(name) for name in cls.model_fields} - cls.nullable
        nulls = [name for name in names & data.keys() if data[name] is None] if isinstance(data, dict) else []
        if nulls:
            raise ValueError(f"Value is not nullable: {', '.join(sorted(nulls))}")
        return data

    def document(self) -> dict[str, Any]:
        """Return the properties that have a value, in the API's spelling."""
        return self.model_dump(by_alias=True, exclude_none=True)
