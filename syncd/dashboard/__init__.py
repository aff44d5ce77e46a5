"""The dashboard below /dashboard: server-rendered pages and forms without scripts.

Start with `app` (the routes), then `pages` (one method per page) and `actions` (the forms). `queries`
collects what the pages show, `views` and `diffs` turn runs and plans into what the templates print;
`templates/page.html` has the navigation. `web` and `session` handle logins, forms and errors. May import:
`runs`, `gateways`, `sources`, `metering` and the rooms below them.
"""
