"""Looking at a spool and seeing to it: what the `spool` commands and the HTTP API have in common."""
