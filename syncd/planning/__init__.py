"""Pure core: what must change to reach the desired state, and what must not.

Start with `plan`; `guards` stops a plan, `orphans` decides about removals.
May import: `metering` (its types), `mapping`, `core`.
"""
