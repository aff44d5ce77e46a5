"""Settings of the mapping."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from openmeter_plugin.metering.rules import DEFAULT_PREFIXES, SubjectPrefixes
from syncd.config.types import Metadata, Section
from syncd.mapping.rules import DEFAULT_KEY, GROUP_FIELDS, Templates, check_template

Template = Annotated[str, Field(min_length=1, max_length=1024), AfterValidator(check_template)]
GroupTemplate = Annotated[
    str, Field(min_length=1, max_length=1024), AfterValidator(lambda text: check_template(text, GROUP_FIELDS))
]


class BillingAddressConfig(Section):
    """A billing address; all parts are templates."""

    country: Template | None = None
    """Two-letter country code, such as `DE`."""
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
    """Details that customers are created with; syncd never changes them afterwards."""

    email: Template | None = None
    """Primary email."""
    currency: Template | None = None
    """Three-letter currency code, such as `EUR`."""
    description: Template | None = None
    """Description."""
    billing_address: BillingAddressConfig = BillingAddressConfig()
    """Billing address."""
    metadata: Annotated[
        Metadata, AfterValidator(lambda given: {k: check_template(v) for k, v in given.items()})
    ] = Field(default_factory=dict)
    """Metadata (v3: labels) in addition to syncd's own; the values are templates."""


class SubjectPrefixesConfig(Section):
    """What precedes an id in a subject."""

    consumer: str = DEFAULT_PREFIXES.consumer
    """For consumers."""
    application: str = DEFAULT_PREFIXES.application
    """For Dev Portal applications, as Kong's own plugins send it."""

    @model_validator(mode="after")
    def _are_usable(self) -> Self:
        self.compiled()
        return self

    def compiled(self) -> SubjectPrefixes:
        """Return the prefixes; raises ValueError if they cannot keep consumers and applications apart."""
        return SubjectPrefixes(self.consumer, self.application)


class MappingConfig(Section):
    """How principals become customers."""

    group_by: Literal["none", "tag", "custom_id", "owner", "file"] = "tag"
    """Which principals share a customer: consumers with the same tag `customer:<key>`, consumers with the
    same `custom_id`, applications of the same `owner`, those that the `file` groups, or `none`."""
    subject_field: Literal["id", "username", "custom_id", "tag"] = "id"
    """The subject that the plugin sends for a consumer; must match the plugin's `subject.field`. `id` is sent
    as `consumer:<id>`; `tag` is the key in `customer:<key>`, or `consumer:<id>` for consumers without that
    tag."""
    subject_prefixes: SubjectPrefixesConfig = SubjectPrefixesConfig()
    """What precedes an id in a subject; must match the plugin's `subject_prefixes`."""
    include_anonymous: bool = False
    """Whether consumers that a plugin uses as `anonymous` get a customer."""
    anonymous_consumers: tuple[str, ...] = ()
    """Ids or usernames of further anonymous consumers, for gateways whose plugins syncd cannot read."""
    key: Template = DEFAULT_KEY
    """Key of a customer of one principal. Do not change it later: other keys mean other customers."""
    name: Template | None = None
    """Name of a customer of one principal. Unset: username, else custom_id, else id."""
    group_key: GroupTemplate = "{group}"
    """Key of a shared customer; must contain `{group}`."""
    group_name: GroupTemplate = "{group}"
    """Initial name of a shared customer; syncd keeps it if you rename the customer."""
    create: CreateConfig = CreateConfig()
    """Details that customers are created with; syncd never changes them afterwards."""
    file: Path | None = None
    """CSV or YAML file that assigns principals to customers."""
    edit_file: bool = False
    """Whether the dashboard may append rows to `file`, if that is CSV. Without it, it shows what to paste."""
    max_subjects_per_customer: Annotated[int, Field(ge=1)] | None = None
    """Maximum number of subjects on a customer; servers of the billing beta allow 1. Unset: no limit."""
    overflow: Literal["block", "split"] = "block"
    """What happens to subjects over that limit: `block` reports them, `split` gives each its own customer."""

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.group_by == "file" and self.file is None:
            raise ValueError("group_by is file, so file must be set")
        if self.subject_field == "tag" and self.group_by != "tag":
            raise ValueError("subject_field is tag, so group_by must be tag")
        if "{group}" not in self.group_key:
            raise ValueError("group_key must contain {group}, or all groups would share one customer")
        if not any(f"{{{name}}}" in self.key for name in ("subject", "id", "username", "custom_id")):
            raise ValueError("key must contain {subject}, {id}, {username} or {custom_id}")
        return self

    def resolved(self, folder: Path) -> Self:
        """Return these settings with a relative `file` resolved against the folder of the configuration."""
        return self if self.file is None else self.model_copy(update={"file": folder / self.file})

    @property
    def templates(self) -> Templates:
        """Return the templates for the mapping rules."""
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
