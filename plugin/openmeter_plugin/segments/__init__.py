"""The Kong segments input: reads the files to which the plugin in Lua appends a line for each request.

Start with `reader`. `line_format` is what is in the files, `folder` opens them safely, `sources` chooses
which are read, `instance_files` has the configurations, `conversion` makes records of lines, `lost_counters`
counts what could not be written, and `process` runs the reader in a process of its own.
May import: `instances`, `metering`, `spool`.
"""
