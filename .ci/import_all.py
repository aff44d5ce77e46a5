"""Imports every module of the packages that are named, so that Python writes the bytecode of what they use.

What is chosen when a program runs (the server's protocols, a database's dialect) is imported by name.
"""

import sys
from importlib import import_module
from pkgutil import walk_packages

CHOSEN_LATER = (
    "sqlalchemy.dialects.postgresql.psycopg",
    "sqlalchemy.dialects.sqlite",
    "uvicorn.lifespan.on",
    "uvicorn.loops.auto",
    "uvicorn.protocols.http.auto",
    "uvicorn.protocols.websockets.auto",
)
NOT_ALONE = (".env", ".kong_pdk")
"""What runs only inside Alembic, and what needs an extra that the images have not."""

for package in sys.argv[1:]:
    for module in walk_packages(import_module(package).__path__, f"{package}."):
        if not module.name.endswith(NOT_ALONE):
            import_module(module.name)
for name in CHOSEN_LATER:
    try:
        import_module(name)
    except ModuleNotFoundError as missing:
        if name.partition(".")[0] != (missing.name or "").partition(".")[0]:
            raise
