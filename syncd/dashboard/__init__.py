"""The dashboard that the daemon serves below /dashboard: rendered here, readable without scripts.

text, diffs, views     pure: how things are said, what a page shows of a run or a plan
reading                looks at other systems in threads, with a deadline and a short memory
probes, customers,     what is read of sources, the metering API and gateways, a bounded part each
gateways
queries                all of the above together, for the pages
session, security      who is logged in, which form is ours, the headers of every answer
web, pages, actions    routes: the frame of all pages, what is shown, what can be done
"""

from syncd.dashboard.app import create_dashboard

__all__ = ["create_dashboard"]
