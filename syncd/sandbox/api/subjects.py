"""Routes under /api/v1/subjects: deprecated in OpenMeter, and absent with --no-subjects."""

from fastapi import APIRouter
from starlette.responses import Response

from syncd.sandbox.api.common import Db, IdOrKey, answer, no_content
from syncd.sandbox.store import subjects as store
from syncd.sandbox.store.subjects import SubjectBody

router = APIRouter(tags=["Subjects"])


@router.get("/api/v1/subjects")
def list_subjects(db: Db) -> Response:
    """List all subjects: an array."""
    with db.reading() as connection:
        return answer(store.list_subjects(connection))


@router.post("/api/v1/subjects")
def upsert_subjects(bodies: list[SubjectBody], db: Db) -> Response:
    """Create or update subjects: takes an array and returns the same subjects, or null for none.

    Not atomic: those before a refused one stay written.
    """
    with db.reading() as connection:
        known = store.known_keys(connection, [body.key for body in bodies])
    written = []
    for body in bodies:
        with db.writing() as connection:
            written.append(store.upsert(connection, body, known))
    return answer(written or None)


@router.get("/api/v1/subjects/{id_or_key}")
def get_subject(id_or_key: IdOrKey, db: Db) -> Response:
    """Return a subject."""
    with db.reading() as connection:
        return answer(store.get(connection, id_or_key))


@router.delete("/api/v1/subjects/{id_or_key}")
def delete_subject(id_or_key: IdOrKey, db: Db) -> Response:
    """Delete a subject; 204."""
    with db.writing() as connection:
        store.delete(connection, id_or_key)
    return no_content()
