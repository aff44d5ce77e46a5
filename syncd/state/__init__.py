"""State: what syncd keeps between runs, in a SQLite file or a PostgreSQL database.

`location` says where it is, `tables` what is in it. `database` opens it, brings its schema up to date
by the revisions in `migrations`, and copies it; `lease` says which syncd may write. The stores, which read
and write the tables, stay with their topics, such as `syncd.runs.history`; they use SQLAlchemy Core and take
a `State`.

Open `database` first.
May import: `core`.
"""
