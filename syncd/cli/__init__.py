"""The `syncd` command line: parses options, calls the other rooms and renders results for people or as JSON.

Start with `main`, which defines the commands; those around the daemon, its state and its notifications are in
`daemon`, those that set up in `setup`. `options` has the options and exit statuses that commands share,
`render` the tables. Texts for people (`plan_text`, `usage_text`, `audit_report`) are files of their own:
commands import them and the other rooms when they run, so that `syncd --help` starts fast.

May import: every room.
"""
