#!/usr/bin/env python3
"""Exit code 0 when the server in this container would serve a request: for HEALTHCHECK, Compose and Kubernetes probes.

Asks GET /health/ready with the key in TRAMONTANE_API_KEY. A server whose keys it does not know answers 401; then it is enough that the
process lives, which /health/live tells everybody. Knows HTTP only: the standard library, no proxy, and no key on a command line.
"""

import http.client
import os
import ssl
import sys
from urllib.parse import urlsplit

TIMEOUT_S = 4.0


def status_of(url: str, path: str, *, key: str | None) -> tuple[int, str]:
    """The status and the body of an answer. Raises OSError or HTTPException."""
    target = urlsplit(url)
    if target.hostname is None:
        raise OSError(f"{url} is no address; write it like http://127.0.0.1:8000")
    connection: http.client.HTTPConnection
    if target.scheme == "https":
        # Its certificate names the host that clients use, not the loopback address that is asked here.
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
