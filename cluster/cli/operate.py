"""`tramontane drain` and `tramontane down`: what an operator does to a running deployment.

`drain` asks a gateway over HTTP. `down` goes to Ray, so that it also works when no gateway runs.
"""

import asyncio
from argparse import Namespace

from cluster.cli.client import Client


def drain(args: Namespace) -> None:
    """Returns when the replica gets no new requests. Raises TramontaneError."""
    body = {} if args.grace is None else {"grace_s": args.grace}
    with Client(args.url, api_key=args.api_key, ca_cert=args.ca_cert) as client:
        client.post(f"/admin/replicas/{args.replica}/drain", body, object)
    print(f"Replica {args.replica} gets no new requests. Its streams finish or move, then it ends.")


def down(args: Namespace) -> None:
    """Returns when nothing of the deployment is left in Ray. Raises ConfigError when Ray cannot be joined."""
    from cluster.ray_runtime.session import connect

    cluster = connect(args.ray_address, namespace=args.name, log_to_driver=False)
    try:
        # After `connect`, which sets what Ray reads when it is imported.
        from cluster.controller.client import ControllerClient
        from cluster.gateway.actor import remove_gateways

        controller = ControllerClient(args.name)
        found = controller.exists
        remove_gateways()
        left = asyncio.run(controller.down())
    finally:
        cluster.close()
    print(f"{args.name!r} is down." if found or left else f"Nothing of {args.name!r} runs on this Ray cluster.")
