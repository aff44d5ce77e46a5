"""The planner: compares the desired with the observed state and returns the changes between them. Pure.

`plan` makes the plan, with `carriers` for subjects that another customer pays for, and `orphans` for those
that lose their source.
`guards` stops a plan that changes too much, or cuts it down to some principals, and `plan_file`
writes a plan for review and compares it with a fresh one.

Open `plan` first.
May import: `mapping`, `core`.
"""
