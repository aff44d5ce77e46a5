"""The settings of the mapping."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from syncd.config.types import Metadata, Section
from syncd.mapping.rules import DEFAULT_KEY, Templates
from syncd.mapping.templates import GROUP_FIELDS, check

Template = Annotated[str, Field(min_length=1, max_length=1024), AfterValidator(check)]
GroupTemplate = Annotated[
    str, Field(min_length=1, max_length=1024), AfterValidator(lambda text: check(text, GROUP_FIELDS))
]


class BillingAddressConfig(Section):
    """A billing address of templates."""

    country: Template | None = None
    """Two letters: `DE`."""
    postal_code: Template | None = None
    """Postal code."""
    state: Template | None = None
    """State or region."""
    city: Template | None = None
    """City."""
    line1: Template | None = None
    """First line."""
    line2: Template | None = None
    """Second line."""
    phone_number: Template | None = None
    """Telephone number."""


class CreateConfig(Section):
    """What customers are created with, and what is never changed afterwards."""

    email: Template | None = None
    """Primary email."""
    currency: Template | None = None
    """Three letters: `EUR`."""
    description: Template | None = None
    """Description."""
    billing_address: BillingAddressConfig = BillingAddressConfig()
    """Billing address."""
    metadata: Annotated[Metadata, AfterValidator(lambda given: {k: check(v) for k, v in given.items()})] = (
        Field(default_factory=dict)
    )
    """Metadata (v3: labels) beside syncd's own marks; the values are templates."""


class MappingConfig(Section):
    """How principals become customers."""

    group_by: Literal["none", "tag", "custom_id", "owner", "file"] = "tag"
    """Who shares a customer: consumers with one tag `customer:<key>`, with one `custom_id`, applications of
    one `owner`, as the `file` says, or nobody."""
    subject_field: Literal["id", "username", "custom_id", "tag"] = "id"
    """How the plugin names a consumer: the same choice as its `subject.field`. `id` is sent as
    `consumer:<id>`; `tag` is the key of `customer:<key>`, and `consumer:<id>` of those without."""
    include_anonymous: bool = False
    """Whether consumers that a plugin uses as `anonymous` get a customer."""
    anonymous_consumers: tuple[str, ...] = ()
    """Ids or usernames of further anonymous consumers, of Kongs whose plugins syncd cannot see."""
    key: Template = DEFAULT_KEY
    """Key of a customer of one principal. Choose it once."""
    name: Template | None = None
    """Its name. Unset: username, else custom_id, else id."""
    group_key: GroupTemplate = "{group}"
    """Key of a shared customer; must hold `{group}`."""
    group_name: GroupTemplate = "{group}"
    """First name of a shared customer; people rename it as they like."""
    create: CreateConfig = CreateConfig()
    """What customers are created with, and what is never changed afterwards."""
    file: Path | None = None
    """CSV or YAML that says who belongs to which customer."""
    max_subjects_per_customer: Annotated[int, Field(ge=1)] | None = None
    """Unset: no limit. Servers of the billing beta allow 1."""
    overflow: Literal["block", "split"] = "block"
    """What does not fit is blocked, or with `split` gets a customer of its own."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.group_by == "file" and self.file is None:
            raise ValueError("group_by is file, so file must name one")
        if self.subject_field == "tag" and self.group_by != "tag":
            raise ValueError("subject_field is tag, so group_by must be tag")
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
