"""The month-end close: one report of a month, the objections to closing it, and closed months.

`closing` closes a month: `collect` reads gateways, meters and customers and finds objections,
`report` holds the content and its digest, `late` finds what arrived for a closed month afterwards, `store`
keeps closed months, `watch` looks at them in the daemon, and `documents` writes a report as CSV and JSON.
`month`, `report`, `late` and `documents` are pure.

Open `closing` first.
May import: `audit`, `runs`, `gateways`, `metering`, `config`, `state`, `core`.
"""
