"""An HTTP API as a page, made of its OpenAPI document: without scripts, with nothing loaded from elsewhere.

The pages that FastAPI brings load scripts from a CDN, which would run on the origin of the API.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any, Final

HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
_STYLE: Final = """
:root { color-scheme: light dark; }
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin-top: 2.5rem; } h3 { margin-bottom: .25rem; } code { font-size: .95em; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; margin: .5rem 0 1rem; }
th, td { text-align: left; vertical-align: top; padding: .3rem .6rem; border-bottom: 1px solid #8888; }
"""

_Document = Mapping[str, Any]


def api_page(document: _Document) -> str:
    """Return the page of an OpenAPI document."""
    info = document["info"]
    title = escape(f"{info['title']} {info['version']}")
    body = "\n".join([*_operations(document), *_security(document), *_schemas(document)])
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>'
        f"<body><main><h1>{title}</h1><p>{escape(info.get('description', ''))}</p>"
        f'<p>As a document for tools: <a href="openapi.json">openapi.json</a>.</p>\n{body}\n'
        "</main></body></html>\n"
    )


def _operations(document: _Document) -> Iterator[str]:
    yield "<h2>Requests</h2>"
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            yield f"<h3><code>{method.upper()} {escape(path)}</code></h3>"
            needs = "Needs the token. " if operation.get("security") else ""
            yield f"<p>{needs}{escape(operation.get('description') or operation.get('summary', ''))}</p>"
            parameters = [
                (one["name"], one["in"], _type(one.get("schema", {})), one.get("description", ""))
                for one in operation.get("parameters", ())
            ]
            yield _table(("parameter", "in", "type", "meaning"), parameters)
            if request := operation.get("requestBody"):
                yield f"<p>Body: {_link(_content(request))}</p>"
            answers = [
                (
                    status,
                    _when(answer),
                    _content(answer),
                )
                for status, answer in sorted(operation["responses"].items())
            ]
            yield _table(("answer", "when", "type"), answers)


def _when(answer: _Document) -> str:
    text = str(answer.get("description", ""))
    return "Success" if text == "Successful Response" else text


def _content(described: _Document) -> str:
    """Return the types of a body."""
    found = (
        _type(media["schema"]) if media.get("schema") else kind
        for kind, media in described.get("content", {}).items()
    )
    return " or ".join(dict.fromkeys(found))


def _security(document: _Document) -> Iterator[str]:
    schemes = document.get("components", {}).get("securitySchemes", {})
    if schemes:
        yield "<h2>Token</h2>"
    for scheme in schemes.values():
        yield f"<p>{escape(scheme.get('description', 'Sent as Authorization: Bearer.'))}</p>"


def _schemas(document: _Document) -> Iterator[str]:
    schemas = document.get("components", {}).get("schemas", {})
    if schemas:
        yield "<h2>Bodies</h2>"
    for name, schema in schemas.items():
        yield f'<h3 id="{escape(name)}"><code>{escape(name)}</code></h3>'
        yield f"<p>{escape(schema.get('description', ''))}</p>"
        required = schema.get("required", ())
        fields = [
            (field, _type(inner), "yes" if field in required else "", inner.get("description", ""))
            for field, inner in schema.get("properties", {}).items()
        ]
        yield _table(("field", "type", "required", "meaning"), fields)


def _type(schema: _Document) -> str:
    """Return the type of a value in a word or two; the name of a schema begins with #."""
    if "$ref" in schema:
        return f"#{schema['$ref'].rpartition('/')[2]}"
    if options := [one for one in schema.get("anyOf", ()) if one.get("type") != "null"]:
        return " or ".join(map(_type, options))
    if "const" in schema:
        return str(schema["const"])
    if "enum" in schema:
        return ", ".join(map(str, schema["enum"]))
    kind = str(schema.get("format") or schema.get("type", "any"))
    return f"list of {_type(schema.get('items', {}))}" if kind == "array" else kind


def _link(text: str) -> str:
    """Return a type with its schema's name as a link."""
    words = (
        f'<a href="{escape(word)}">{escape(word[1:])}</a>' if word.startswith("#") else escape(word)
        for word in text.split()
    )
    return " ".join(words)


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Return a table, or nothing without rows; types become links to their schemas."""
    if not rows:
        return ""
    head = "".join(f'<th scope="col">{name}</th>' for name in header)
    lines = [
        "".join(
            f"<td>{_link(cell) if name == 'type' else escape(cell)}</td>"
            for name, cell in zip(header, row, strict=True)
        )
        for row in rows
    ]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
