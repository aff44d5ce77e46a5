"""The checks of `syncd doctor`: connectivity, permissions and configuration.

`checkup` reads and runs all checks in order, and sends the event of the probe. `checks`, `subjects` and `ai`
are functions from values to findings, and `plugins` reads Kong's plugins.

Open `checkup` first.
May import: `audit`, `runs`, `gateways`, `sources`, `metering`, `config`, `mapping`, `http`, `state`, `core`.
"""
