"""The dashboard below /dashboard: server-rendered pages and forms without scripts.

Open `app` first: it has the routes, and names the module of each page. `queries` reads other systems for
pages, without waiting for slow ones; `tables` and `charts` draw for all of them, `views` and `diffs` turn
runs and plans into what the templates print. `templates/page.html` has the navigation. `web` and `session`
handle logins, forms and errors, `actions` the forms of login and resync.

May import: `close`, `usage`, `runs`, `planning`, `customers`, `gateways`, `sources`, `metering`, `config`,
`mapping`, `http`, `state`, `core`.
"""
