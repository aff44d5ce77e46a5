"""Plugin instances: which configuration an instance id means, in every worker and after a restart.

Also makes the spool record of a log under an instance's rules. Start with `instance`, then `record`.
May import: `config`, `metering`, `spool`.
"""
