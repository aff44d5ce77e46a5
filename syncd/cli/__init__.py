"""The `syncd` command line: parses options, calls the other rooms and renders results for people or as JSON.

Start with `main`, which defines the commands; those around the daemon are in `daemon`. `options` has the
options and exit statuses that commands share, `render` the tables. Commands import the other rooms when they
run, so that `syncd --help` starts fast. May import: every room.
"""
