"""The settings of the mapping."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from syncd.config_types import Metadata, Section
from syncd.mapping import Templates
from syncd.mapping.templates import GROUP_FIELDS, check

Template = Annotated[str, Field(min_length=1, max_length=1024), AfterValidator(check)]
GroupTemplate = Annotated[
    str, Field(min_length=1, max_length=1024), AfterValidator(lambda text: check(text, GROUP_FIELDS))
]


class BillingAddressConfig(Section):
    """A billing address of templates."""

    country: Template | None = None
    postal_code: Template | None = None
    state: Template | None = None
    city: Template | None = None
    line1: Template | None = None
    line2: Template | None = None
    phone_number: Template | None = None


class CreateConfig(Section):
    """What customers are created with, and what is never changed afterwards."""

    email: Template | None = None
    currency: Template | None = None
    description: Template | None = None
    billing_address: BillingAddressConfig = BillingAddressConfig()
    metadata: Annotated[Metadata, AfterValidator(lambda given: {k: check(v) for k, v in given.items()})] = (
        Field(default_factory=dict)
    )


class MappingConfig(Section):
    """How principals become customers."""

    group_by: Literal["none", "tag", "custom_id", "owner", "file"] = "tag"
    subject_field: Literal["id", "username", "custom_id"] = "id"
    include_anonymous: bool = False
    anonymous_consumers: tuple[str, ...] = ()
    key: Template = "{subject}"
    name: Template | None = None
    group_key: GroupTemplate = "{group}"
    group_name: GroupTemplate = "{group}"
    create: CreateConfig = CreateConfig()
    file: Path | None = None
    max_subjects_per_customer: Annotated[int, Field(ge=1)] | None = None
    overflow: Literal["block", "split"] = "block"

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.group_by == "file" and self.file is None:
            raise ValueError("group_by is file, so file must name one")
        if "{group}" not in self.group_key:
            raise ValueError("group_key must hold {group}, or all groups would be one customer")
        if not any(f"{{{name}}}" in self.key for name in ("subject", "id", "username", "custom_id")):
            raise ValueError("key must hold {subject}, {id}, {username} or {custom_id}")
        return self

    def anchored(self, folder: Path) -> Self:
        """Return these settings with the path of the file relative to that of the configuration."""
        return self if self.file is None else self.model_copy(update={"file": folder / self.file})

    @property
    def templates(self) -> Templates:
        """Return the templates as the mapping wants them."""
        address = self.create.billing_address.model_dump(exclude_none=True)
        return Templates(
            key=self.key,
            name=self.name,
            group_key=self.group_key,
            group_name=self.group_name,
            email=self.create.email,
            currency=self.create.currency,
            description=self.create.description,
            billing_address=address,
            metadata=self.create.metadata,
        )
