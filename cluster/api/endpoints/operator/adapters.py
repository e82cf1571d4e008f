"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter as vLLM has them, and /admin/adapters. They require an admin key.

Knows the bodies and answers; an `Admin` does the work for the whole deployment. Without one, these paths are answered with 404.
"""

import contextlib

import msgspec
from aiohttp import web

from cluster.adapters.registry import find_adapter
from cluster.api.context import CONTEXT, Admin
from cluster.api.generation.answering import json_response
from cluster.api.request_context import REQUEST_CONTEXT
from cluster.api.server.body import read_body, take_body
from cluster.api.server.request_options import ADAPTER
from cluster.protocol.adapters import Adapter, AdapterRevision
from workers.errors import RequestError


class LoadAdapterRequest(msgspec.Struct, frozen=True, kw_only=True):
    """`lora_path`: a folder on the server, or a Hub id. `load_inplace`: replace the revision that serves. `canary`: the share of new
    requests that get it beside that revision, such as 0.1 or "10%". `base_model_name`: the served model that it belongs to, where the
    server has several.
    """

    lora_name: str
    lora_path: str
    load_inplace: bool = False
    canary: float | str | None = None
    base_model_name: str | None = None


class UnloadAdapterRequest(msgspec.Struct, frozen=True, kw_only=True):
    lora_name: str


class AdapterList(msgspec.Struct, frozen=True, kw_only=True):
    """`adapters`: what each name serves, as ids of revisions. `revisions`: all that are loaded, or could not be."""

    adapters: tuple[Adapter, ...]
    revisions: tuple[AdapterRevision, ...]


async def load(request: web.Request) -> web.Response:
    """Returns when every replica has the adapter: the next request may name it, at this gateway."""
    admin = _admin(request)
    body = await read_body(request, LoadAdapterRequest)
    if not body.lora_name or not body.lora_path:
        raise RequestError("Both 'lora_name' and 'lora_path' must be provided.", param="lora_name")
    share = None if body.canary is None else parse_share(body.canary)
    base = body.base_model_name
    if base is not None:
        request.app[CONTEXT].serving(base).check_model(base, request[REQUEST_CONTEXT])
    revision = await admin.load_adapter(
        body.lora_name, body.lora_path, share=share, in_place=body.load_inplace, base_model=base
    )
    text = f"Success: LoRA adapter '{body.lora_name}' added successfully."
    return web.Response(text=text, headers={ADAPTER: revision.id})


async def unload(request: web.Request) -> web.Response:
    """New requests cannot name the adapter any more; running ones end on it."""
    admin = _admin(request)
    body = await read_body(request, UnloadAdapterRequest)
    await admin.change_adapter("unload", body.lora_name)
    return web.Response(text=f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


async def list_adapters(request: web.Request) -> web.Response:
    """All adapters and their revisions, as this gateway knows them."""
    _admin(request)
    registries = [model.adapters.registry for model in request.app[CONTEXT].models]
    return json_response(
        AdapterList(
            adapters=tuple(adapter for registry in registries for adapter in registry.adapters),
            revisions=tuple(revision for registry in registries for revision in registry.revisions),
        )
    )


async def promote(request: web.Request) -> web.Response:
    """The canary becomes the current revision."""
    take_body(request)
    name = request.match_info["name"]
    registry = await _admin(request).change_adapter("promote", name)
    return web.Response(body=msgspec.json.encode(find_adapter(registry, name)), content_type="application/json")


async def rollback(request: web.Request) -> web.Response:
    """Ends the canary; without one, the revision before the current one serves again."""
    take_body(request)
    name = request.match_info["name"]
    registry = await _admin(request).change_adapter("rollback", name)
    return web.Response(body=msgspec.json.encode(find_adapter(registry, name)), content_type="application/json")


def parse_share(share: float | str) -> float:
    """ "10%" and 0.1 are a tenth. Raises RequestError."""
    number = -1.0
    with contextlib.suppress(ValueError):
        number = float(share.strip().removesuffix("%")) if isinstance(share, str) else float(share)
    if isinstance(share, str) and share.strip().endswith("%"):
        number /= 100.0
    if not 0.0 < number <= 1.0:
        raise RequestError(
            f"'canary' is {share!r}, which is not a share of the requests.",
            remedy="Send a number above 0 and up to 1, or a percentage such as '10%'.",
            param="canary",
        )
    return number


def _admin(request: web.Request) -> Admin:
    admin = request.app[CONTEXT].admin
    if admin is None:
        raise web.HTTPNotFound
    return admin
