"""`tramontane drain` and `tramontane down`: what an operator does to a running deployment.

`drain` asks a gateway over HTTP. `down` goes to Ray, so that it also works when no gateway runs.
"""

import asyncio
from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cluster.cli.client import Client
from cluster.protocol.names import member_of, server_of

if TYPE_CHECKING:
    from cluster.controller.client import ControllerClient


def drain(args: Namespace) -> None:
    """Returns when the replica gets no new requests. Raises TramontaneError."""
    body = {} if args.grace is None else {"grace_s": args.grace}
    with Client(args.url, api_key=args.api_key, ca_cert=args.ca_cert) as client:
        client.post(f"/admin/replicas/{args.replica}/drain", body, object)
    print(f"Replica {args.replica} gets no new requests. Its streams finish or move, then it ends.")


def down(args: Namespace) -> None:
    """Returns when nothing of the deployment is left in Ray. Raises ConfigError when Ray cannot be joined."""
    from cluster.ray_runtime.session import connect

    cluster = connect(args.ray_address, namespace=server_of(args.name), log_to_driver=False)
    try:
        # After `connect`, which sets what Ray reads when it is imported.
        from cluster.controller.client import ControllerClient, running_deployments
        from cluster.gateway.actor import remove_gateways

        # One member of a server with several models leaves the others, and the gateways.
        names = [args.name] if member_of(args.name) else [args.name, *running_deployments(args.name)]
        found = any(ControllerClient(name).exists for name in names)
        if member_of(args.name) is None:
            remove_gateways()
        left = asyncio.run(_down([ControllerClient(name) for name in dict.fromkeys(names)]))
    finally:
        cluster.close()
    print(f"{args.name!r} is down." if found or left else f"Nothing of {args.name!r} runs on this Ray cluster.")


async def _down(controllers: Sequence["ControllerClient"]) -> int:
    """How many ranks were still running."""
    return sum(await asyncio.gather(*(controller.down() for controller in controllers)))
