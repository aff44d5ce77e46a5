"""The settings of a plugin instance in Kong: schema, validation, and compilation into metering rules.

Open `schema` first: it defines every setting. `instance_config` validates what Kong sends.
May import: `metering`, `spool`.
"""
