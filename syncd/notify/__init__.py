"""Notifications of what a person has to know, each once: what is new, what was sent, and Apprise.

Open `watch` first: its thread looks at runs and gateways and sends. `conditions` says what is to be known,
without I/O. Nothing here can delay or fail a run.
May import: `runs`, `gateways`, `config`, `state`, `core`.
"""
