"""`tramontane drain` and `tramontane down`: what an operator does to a running deployment.

`drain` asks a gateway over HTTP; `down` goes to Ray, since it must also work when no gateway runs.
"""

import asyncio
import json
import urllib.error
import urllib.request
from argparse import Namespace
from pathlib import Path

from cluster.system.tls import client_context, distrust
from workers.errors import ConfigError, ReplicaUnavailableError, RequestError

TIMEOUT_S = 15.0


def drain(args: Namespace) -> None:
    """Returns when the replica takes nothing new. Raises TramontaneError."""
    body = {} if args.grace is None else {"grace_s": args.grace}
    ask(f"{args.url}/admin/replicas/{args.replica}/drain", api_key=args.api_key, ca_cert=args.ca_cert, body=body)
    print(f"Replica {args.replica} takes nothing new; its streams finish or move, then it ends.")


def ask(url: str, *, api_key: str | None, ca_cert: Path | None = None, body: object | None = None) -> bytes:
    """GET, or POST of `body` as JSON. Raises ReplicaUnavailableError, ConfigError for a wrong key, RequestError otherwise."""
    headers = {"Content-Type": "application/json"}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, data=data, headers=headers), timeout=TIMEOUT_S, context=client_context(ca_cert)
        ) as answer:
            return answer.read()
    except urllib.error.HTTPError as e:
        message = _message(e)
        if e.code in (401, 403):
            raise ConfigError(f"{message} Give the server's key with --api-key or TRAMONTANE_API_KEY.") from e
        raise RequestError(message) from e
    except (OSError, ValueError) as e:
        if distrusted := distrust(url, e):
            raise distrusted from e
        raise ReplicaUnavailableError(f"Nothing answers at {url} ({e}); give the server's address with --url.") from e


def _message(error: urllib.error.HTTPError) -> str:
    try:
        return json.load(error)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return f"The server answered {error.code} {error.reason}."


def down(args: Namespace) -> None:
    """Returns when nothing of the deployment is left in Ray. Raises ConfigError when Ray cannot be joined."""
    from cluster.ray_runtime.session import connect

    cluster = connect(args.ray_address, namespace=args.name, log_to_driver=False)
    try:
        # Behind `connect`, which sets what Ray reads when it is imported.
        from cluster.controller.client import ControllerClient
        from cluster.gateway.actor import remove_gateways

        controller = ControllerClient(args.name)
        found = controller.exists
        remove_gateways()
        left = asyncio.run(controller.down())
    finally:
        cluster.close()
    print(f"{args.name!r} is down." if found or left else f"Nothing of {args.name!r} runs on this Ray cluster.")
