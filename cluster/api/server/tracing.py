"""The span of each HTTP request to an endpoint that does something for a client, from its head to its last byte.

Knows aiohttp and which paths are not worth a span; what is in a span is in cluster/tracing. Only in the application where traces have
somewhere to go.
"""

import asyncio

from aiohttp import hdrs, web
from aiohttp.typedefs import Middleware

from cluster.api.server.auth import path_of
from cluster.api.server.errors import ClientGoneError, Handler
from cluster.api.server.request_options import REQUEST_ID, request_id_middleware, request_id_of
from cluster.system.log import request_id_var, trace_ids_var
from cluster.tracing.request import GatewayTracing, RequestTrace
from workers.tracing.attributes import Attributes, text

# Not set where nothing is traced.
TRACE = web.RequestKey("trace", RequestTrace)
# What monitors and the web page ask for all the time.
NOT_TRACED = (
    "/health",
    "/ping",
    "/metrics",
    "/version",
    "/admin/cluster",
    "/admin/operations",
    "/static/",
    "/docs",
    "/openapi.json",
)
CLIENT_GONE = 499


def make_middleware(tracing: GatewayTracing) -> Middleware:
    """Instead of `request_id_middleware`, which it does as well: each further layer would cost every token of a stream a little."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        route = path_of(request)
        if route in ("", "/") or route.startswith(NOT_TRACED):
            return await request_id_middleware(request, handler)
        request_id = request_id_of(request)
        id_token = request_id_var.set(request_id)
        trace = request[TRACE] = tracing.http_request(
            route, method=request.method, attributes=_attributes(request), headers=request.headers
        )
        token = trace_ids_var.set(trace.ids)
        try:
            response = await handler(request)
        except (asyncio.CancelledError, ConnectionError, ClientGoneError):
            trace.end_response(CLIENT_GONE, disconnected=True)
            raise
        except BaseException:
            trace.end_response(500, disconnected=False)
            raise
        finally:
            trace_ids_var.reset(token)
            request_id_var.reset(id_token)
        if response.prepared:
            trace.end_response(response.status, disconnected=_has_gone(request))
        else:
            response.headers[REQUEST_ID] = request_id
        return response

    return middleware


def end_trace(request: web.BaseRequest, response: web.StreamResponse) -> None:
    """The last byte of a response was sent, or cannot be."""
    trace = request.get(TRACE)
    if trace is not None:
        trace.end_response(response.status, disconnected=_has_gone(request))


def _has_gone(request: web.BaseRequest) -> bool:
    return request.transport is None or request.transport.is_closing()


def _attributes(request: web.Request) -> Attributes:
    attributes: dict[str, str | int] = {
        "url.path": text(request.path),
        "url.scheme": request.scheme,
        "tramontane.request.id": request_id_var.get() or "",
    }
    if request.remote is not None:
        attributes["client.address"] = request.remote
    if (agent := request.headers.get(hdrs.USER_AGENT)) is not None:
        attributes["user_agent.original"] = text(agent, max_chars=256)
    return attributes
