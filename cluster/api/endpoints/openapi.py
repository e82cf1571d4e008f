"""GET /openapi.json: the endpoints and the very structs that validate bodies, as OpenAPI 3.1.

Knows OpenAPI's form; every fact comes from the table it is given (endpoints.py) and from msgspec's JSON schemas.
"""

import re
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import msgspec
from aiohttp import web

from cluster.api.endpoints.endpoint import Endpoint
from cluster.api.server.errors import ErrorEnvelope

OPENAPI = web.AppKey("openapi", bytes)
_REF = "#/components/schemas/{name}"
_ERRORS = {
    400: "The request cannot be served as it stands; `param` names what to change.",
    401: "No key, or one that is not known.",
    403: "The key may not do this.",
    404: "There is no such thing.",
    408: "The request took too long to arrive.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    429: "Too much at once, for the server or for the key; Retry-After says when to come back.",
    500: "The server failed.",
    503: "No replica can serve the request now; Retry-After says when to come back.",
    504: "The time that the client gave its request is over.",
}


async def handle(request: web.Request) -> web.Response:
    """The document, made when the application was."""
    return web.Response(body=request.app[OPENAPI], content_type="application/json")


def render(endpoints: Sequence[Endpoint]) -> bytes:
    """The document for these endpoints."""
    types = [ErrorEnvelope, *(t for e in endpoints for t in (e.body, e.form, e.answer, e.chunk) if t is not None)]
    schemas, components = msgspec.json.schema_components(types, ref_template=_REF)
    schema_of = dict(zip(map(id, types), schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in endpoints:
        path = re.sub(r"\{(\w+):[^}]*\}", r"{\1}", endpoint.path)
        paths.setdefault(path, {})[endpoint.method.lower()] = _operation(endpoint, path, schema_of)
    document = {
        "openapi": "3.1.0",
        "info": {
            "title": "Tramontane",
            "version": version("tramontane"),
            "description": "OpenAI's API for Mistral-family models, with vLLM's additions. Every field acts or is refused by name.",
        },
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}],
    }
    return msgspec.json.encode(document)


def _operation(endpoint: Endpoint, path: str, schema_of: dict[int, Any]) -> dict[str, Any]:
    content: dict[str, Any] = {
        endpoint.content_type: {"schema": schema_of[id(endpoint.answer)]} if endpoint.answer else {}
    }
    if endpoint.chunk is not None:
        content["text/event-stream"] = {
            "schema": {
                "type": "object",
                "required": ["data"],
                "properties": {"data": {"type": "string", "description": "JSON of `x-event`; at the end `[DONE]`."}},
            },
            "x-event": schema_of[id(endpoint.chunk)],
        }
    error = {"application/json": {"schema": schema_of[id(ErrorEnvelope)]}}
    statuses = sorted({*endpoint.errors, *(() if endpoint.is_open else (401, 403))})
    operation: dict[str, Any] = {
        "summary": endpoint.summary,
        "operationId": f"{endpoint.method.lower()}_{re.sub(r'[^a-z]+', '_', path.strip('/').lower()).strip('_') or 'root'}",
        "responses": {
            str(endpoint.success): {"description": "Done.", "content": content},
            **{str(status): {"description": _ERRORS[status], "content": error} for status in statuses},
        },
    }
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"\{(\w+)\}", path)
    ]
    parameters += [{"name": name, "in": "query", "schema": {"type": "string"}} for name in endpoint.query]
    if parameters:
        operation["parameters"] = parameters
    if endpoint.body is not None:
        schema = schema_of[id(endpoint.body)]
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    if endpoint.form is not None:
        schema = schema_of[id(endpoint.form)]
        operation["requestBody"] = {"required": True, "content": {"multipart/form-data": {"schema": schema}}}
    if endpoint.is_open:
        operation["security"] = []
    return operation
