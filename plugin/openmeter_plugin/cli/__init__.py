"""The command line `openmeter-plugin`: its commands, options, and output for people.

Open `main` first: it has `serve` and `deliver`. `spool` has the commands of `openmeter-plugin spool`.
May import: every room.
"""
