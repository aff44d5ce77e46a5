"""The month-end close: one report of a month, the objections to closing it, and closed months.

`closing` closes a month, and looks at closed months in the daemon: `collect` reads gateways, meters
(`meters`) and customers and finds objections, `report` holds the content and its digest, and finds what
arrived for a closed month afterwards, `store` keeps closed months, and `documents` writes a report as CSV and
JSON. `report` and `documents` are pure.

Open `closing` first.
May import: `audit`, `usage`, `runs`, `gateways`, `metering`, `config`, `state`, `core`.
"""
