"""The page of an API: what the document says, and nothing that a text in it could do."""

from __future__ import annotations

from openmeter_plugin.process.api_page import api_page

EVIL = "<script>alert(1)</script>"
IN = {"$ref": "#/components/schemas/In"}
DOCUMENT = {
    "info": {"title": EVIL, "version": "1", "description": EVIL},
    "paths": {
        "/a/{id}": {
            "post": {
                "description": EVIL,
                "security": [{"b": []}],
                "parameters": [
                    {"name": "id", "in": "path", "schema": {"type": "string"}, "description": EVIL}
                ],
                "requestBody": {
                    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/In"}}}
                },
                "responses": {"202": {"description": EVIL}},
            }
        }
    },
    "components": {
        "schemas": {
            "In": {
                "required": ["kind"],
                "properties": {
                    "kind": {"enum": ["x", "y"]},
                    "more": {"type": "array", "items": IN},
                    "maybe": {"anyOf": [{"type": "integer"}, {"type": "null"}], "description": EVIL},
                },
            }
        },
        "securitySchemes": {"b": {"description": EVIL}},
    },
}


def test_texts_of_the_document_are_texts() -> None:
    page = api_page(DOCUMENT)
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 7


def test_parameters_bodies_and_their_types_are_told() -> None:
    page = api_page(DOCUMENT)
    assert "<code>POST /a/{id}</code>" in page
    assert "Needs the token." in page
    assert 'Body: <a href="#In">In</a>' in page
    assert "<td>x, y</td><td>yes</td>" in page
    assert "<td>integer</td><td></td>" in page
    assert "list of #In" not in page
