"""GET /, /docs and /static/NAME: the web page and the API's documentation, as files of cluster/web.

Knows where the files lie, their types, and the content security policy that keeps them to this origin. They hold nothing secret and
need no key: what they show, they ask the API for, with the key of whoever looks. Builds nothing; there is no template.
"""

from pathlib import Path

from aiohttp import hdrs, web

FOLDER = Path(__file__).resolve().parents[1] / "web"
# No inline script or style and no other origin, so that not even a model's answer could bring one in.
CONTENT_SECURITY_POLICY = (
    "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
CONTENT_TYPES = {  # not the system's table, in which .js may be anything
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


def routes() -> list[web.RouteDef]:
    """A name under /static/ has no slash and only known endings, so that nothing beside those files can be reached."""
    return [
        web.get("/", index),
        web.get("/docs", docs),
        web.get(r"/static/{name:[a-z_]+\.(?:css|js|svg)}", static),
    ]


async def index(request: web.Request) -> web.FileResponse:
    """The playground and the cluster's live view."""
    return _file(FOLDER / "index.html")


async def docs(request: web.Request) -> web.FileResponse:
    """What /openapi.json says, for people."""
    return _file(FOLDER / "docs.html")


async def static(request: web.Request) -> web.FileResponse:
    """Raises HTTPNotFound."""
    path = FOLDER / "static" / request.match_info["name"]
    if not path.is_file():
        raise web.HTTPNotFound
    return _file(path)


def _file(path: Path) -> web.FileResponse:
    """With an ETag, by which browsers ask each time whether it changed: after an upgrade no old script meets a new server."""
    headers = {
        hdrs.CONTENT_TYPE: CONTENT_TYPES[path.suffix],
        hdrs.CACHE_CONTROL: "no-cache",
        "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    }
    return web.FileResponse(path, headers=headers)
