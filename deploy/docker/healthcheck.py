#!/usr/bin/env python3
"""Exits with 0 if the server in this container would serve a request. For HEALTHCHECK, Compose and Kubernetes probes.

Calls GET /health/ready with the key in TRAMONTANE_API_KEY. If the server answers 401, the key is unknown to it, and GET /health/live, which
needs no key, decides. Uses only the standard library and no proxy, and puts no key on a command line.
"""

import http.client
import os
import ssl
import sys
from urllib.parse import urlsplit

TIMEOUT_S = 4.0


def status_of(url: str, path: str, *, key: str | None) -> tuple[int, str]:
    """The status and the body of the response. Raises OSError or HTTPException."""
    target = urlsplit(url)
    if target.hostname is None:
        raise OSError(f"{url} is not a URL. Write it like http://127.0.0.1:8000.")
    connection: http.client.HTTPConnection
    if target.scheme == "https":
        # The certificate names the host that clients use, not the loopback address used here.
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        connection = http.client.HTTPSConnection(target.hostname, target.port, timeout=TIMEOUT_S, context=context)
    else:
        connection = http.client.HTTPConnection(target.hostname, target.port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", path, headers={"Authorization": f"Bearer {key}"} if key else {})
        response = connection.getresponse()
        return response.status, response.read().decode(errors="replace")
    finally:
        connection.close()


def main(url: str = "http://127.0.0.1:8000") -> int:
    try:
        status, body = status_of(url, "/health/ready", key=os.environ.get("TRAMONTANE_API_KEY"))
        if status == 401:
            status, body = status_of(url, "/health/live", key=None)
    except (OSError, http.client.HTTPException) as e:
        status, body = 0, str(e)
    print(body)
    return 0 if status == 200 else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
