"""Gateways: the client of the plugin's HTTP API on a gateway, and the models of its answers.

Start with `client`.
May import: `config`, `http`, `core`.
"""
