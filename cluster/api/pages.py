"""GET /, /docs and /static/NAME: the web page and the API's documentation, served from the files in cluster/web.

Knows where the files are, their types, and the content security policy that restricts them to this origin. The files contain no secrets
and need no key: the page gets its data from the API, with the user's key. There are no templates and no build step.
"""

import functools
import hashlib
from pathlib import Path

from aiohttp import hdrs, web
from aiohttp.helpers import ETAG_ANY

FOLDER = Path(__file__).resolve().parents[1] / "web"
# No inline script or style and no other origin, so that not even a model's output could inject one.
CONTENT_SECURITY_POLICY = (
    "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# Not from the system's table, in which .js may have any type.
CONTENT_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


def routes() -> list[web.RouteDef]:
    """A name under /static/ has no slash and a known suffix, so that no other files can be reached."""
    return [
        web.get("/", index),
        web.get("/docs", docs),
        web.get(r"/static/{name:[a-z_]+\.(?:css|js|svg)}", static),
    ]


async def index(request: web.Request) -> web.Response:
    """The playground and the cluster's live view."""
    return _answer(request, FOLDER / "index.html")


async def docs(request: web.Request) -> web.Response:
    """The API reference: /openapi.json as a readable page."""
    return _answer(request, FOLDER / "docs.html")


async def static(request: web.Request) -> web.Response:
    """Raises HTTPNotFound."""
    path = FOLDER / "static" / request.match_info["name"]
    if not path.is_file():
        raise web.HTTPNotFound
    return _answer(request, path)


def _answer(request: web.Request, path: Path) -> web.Response:
    """Browsers must revalidate each time, by the ETag: after an upgrade, no old script talks to a new server.

    Not a FileResponse: `sendfile` writes past the transport, so a client that reads nothing could not be noticed.
    """
    content, etag = _read(path, path.stat().st_mtime_ns)
    response = web.Response(
        headers={hdrs.CACHE_CONTROL: "no-cache", "Content-Security-Policy": CONTENT_SECURITY_POLICY}
    )
    response.etag = etag
    if any(known.value in (etag, ETAG_ANY) for known in request.if_none_match or ()):
        response.set_status(304)
        return response
    response.headers[hdrs.CONTENT_TYPE] = CONTENT_TYPES[path.suffix]
    response.body = content
    return response


@functools.lru_cache(maxsize=64)
def _read(path: Path, mtime_ns: int) -> tuple[bytes, str]:
    """The content and its ETag. mtime_ns: when the file last changed, so that a page can be edited while the server runs."""
    content = path.read_bytes()
    return content, hashlib.sha256(content).hexdigest()[:32]
