"""The checks of `syncd doctor`: connectivity, permissions and configuration.

`checkup` reads and runs all checks in order. `checks` are pure functions from values to findings, `plugins`
reads Kong's plugins, `subjects` compares their subjects with the mapping, and `writes` tests the token.

Open `checkup` first. May import: `audit`, `runs`, `gateways`, `sources`, `metering`.
"""
