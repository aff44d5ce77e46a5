"""The checks of `syncd doctor`: connectivity, permissions and configuration.

`checkup` reads and runs all checks in order. `checks`, `subjects` and `ai` are functions from values to
findings, `plugins` reads Kong's plugins, and `probe` sends its event.

Open `checkup` first.
May import: `audit`, `runs`, `gateways`, `sources`, `metering`, `config`, `mapping`, `http`, `state`, `core`.
"""
