"""GET /openapi.json: the endpoints, and the structs that validate bodies, as an OpenAPI 3.1 document.

Knows OpenAPI's format; all facts come from the table of endpoints (table.py) and from msgspec's JSON schemas.
"""

import re
from functools import cache
from importlib.metadata import version
from typing import Any

import msgspec
from aiohttp import web

from cluster.api.endpoints.endpoint import Endpoint
from cluster.api.schemas.parsing.foreign_fields import FOREIGN, Foreign
from cluster.api.server.errors import ErrorEnvelope

OPENAPI = web.AppKey("openapi", bytes)
_REF = "#/components/schemas/{name}"
_ERRORS = {
    400: "The request is invalid; `param` names the field to change.",
    401: "The API key is missing or wrong.",
    403: "The API key does not allow this.",
    404: "Not found.",
    408: "The request took too long to arrive.",
    413: "The request body is too large.",
    415: "The request body has the wrong content type or is compressed.",
    429: "The server is full, or the API key has reached a limit. Retry after the time in Retry-After.",
    500: "The server failed to process the request.",
    503: "No replica can serve the request now. Retry after the time in Retry-After.",
    504: "The request did not finish within the time in X-Request-Timeout.",
}


async def handle(request: web.Request) -> web.Response:
    """The document, which was made together with the application."""
    return web.Response(body=request.app[OPENAPI], content_type="application/json")


@cache
def render(endpoints: tuple[Endpoint, ...]) -> bytes:
    """The document for these endpoints. It takes 25 ms and never changes, and a process may have several applications."""
    types = [ErrorEnvelope, *(t for e in endpoints for t in (e.body, e.form, e.response, e.chunk) if t is not None)]
    schemas, components = msgspec.json.schema_components(types, ref_template=_REF)
    schema_of = dict(zip(map(id, types), schemas, strict=True))
    for component in components.values():
        if "description" in component:  # a docstring, with its line breaks and indentation
            component["description"] = " ".join(component["description"].split())
    for kind, table in FOREIGN.items():
        properties = components[kind.__name__]["properties"]
        for name, foreign in table.items():
            properties.setdefault(name, _foreign_schema(foreign))
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in endpoints:
        path = re.sub(r"\{(\w+):[^}]*\}", r"{\1}", endpoint.path)
        paths.setdefault(path, {})[endpoint.method.lower()] = _operation(endpoint, path, schema_of)
    document = {
        "openapi": "3.1.0",
        "info": {
            "title": "Tramontane",
            "version": version("tramontane"),
            "description": "An OpenAI-compatible API for Mistral-family models, with vLLM's additions. "
            "A field that would change the answer and is not supported is refused by its name. Other fields without effect are "
            "accepted and named in the header X-Tramontane-Ignored.",
        },
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
                "api-key": {"type": "apiKey", "in": "header", "name": "api-key"},
            },
        },
        "security": [{"key": []}, {"x-api-key": []}, {"api-key": []}],
    }
    return msgspec.json.encode(document)


def _foreign_schema(foreign: Foreign) -> dict[str, Any]:
    """Of a field that never acts: any value, or one of those that ask for nothing."""
    if foreign.neutral is None:
        return {"description": f"Accepted without effect. {foreign.meaning}"}
    return {"description": f"Not supported. {foreign.meaning}", "enum": list(foreign.neutral)}


def _operation(endpoint: Endpoint, path: str, schema_of: dict[int, Any]) -> dict[str, Any]:
    content: dict[str, Any] = {
        endpoint.content_type: {"schema": schema_of[id(endpoint.response)]} if endpoint.response else {}
    }
    if endpoint.chunk is not None:
        content["text/event-stream"] = {
            "schema": {
                "type": "object",
                "required": ["data"],
                "properties": {
                    "data": {"type": "string", "description": "JSON as in `x-event`; the last event is `[DONE]`."}
                },
            },
            "x-event": schema_of[id(endpoint.chunk)],
        }
    error = {"application/json": {"schema": schema_of[id(ErrorEnvelope)]}}
    statuses = sorted({*endpoint.errors, *(() if endpoint.is_open else (401, 403))})
    operation: dict[str, Any] = {
        "summary": endpoint.summary,
        "operationId": f"{endpoint.method.lower()}_{re.sub(r'[^a-z]+', '_', path.strip('/').lower()).strip('_') or 'root'}",
        "responses": {
            str(endpoint.success): {"description": "Success.", "content": content},
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
