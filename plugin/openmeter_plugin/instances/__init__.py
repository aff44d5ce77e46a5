"""Plugin instances: which configuration an id means, in every worker and after a restart.

Also the spool record that an instance makes of a log. Start with `instance`.
May import: `config`, `metering`, `spool`.
"""
