"""The rows of the commands for a running deployment: `status`, `drain` and `down`."""

from cluster.cli.options.option import Command, Group, argument, option, switch
from cluster.cli.options.rows.shared import LOG_LEVEL, NAME, RAY_ADDRESS_ENV, URL_ROWS

STATUS = Command(
    name="status",
    help="show replicas, ranks, KV use and throughput of a running server",
    description="Shows replicas, ranks, nodes, KV use and throughput of a running server, as a live table.",
    run="cluster.cli.status:status",
    groups=(
        Group(
            None,
            (
                *URL_ROWS,
                option("--watch", parse=float, metavar="S", default=1.0, help="seconds between two polls"),
                switch("--once", help="print one table and exit; the default where stdout is not a terminal"),
                switch("--json", help="print the state of the cluster as JSON and exit"),
            ),
        ),
    ),
)

DRAIN = Command(
    name="drain",
    help="take a replica out of service without breaking a stream",
    description="Sends no new requests to a replica, lets its streams finish or move to other replicas, then ends it. "
    "A new replica replaces it.",
    run="cluster.cli.operate:drain",
    groups=(
        Group(
            None,
            (
                argument("replica", metavar="REPLICA", help="its name, such as r0 (see `tramontane status`)"),
                option(
                    "--grace",
                    parse=float,
                    metavar="S",
                    help="seconds that streams may take to finish before they move",
                    shown_default="the server's --drain-timeout",
                ),
                *URL_ROWS,
            ),
        ),
    ),
)

DOWN = Command(
    name="down",
    help="stop a deployment on a Ray cluster",
    description="Stops every replica and gateway and the controller of a deployment. Ray itself keeps running.",
    run="cluster.cli.operate:down",
    groups=(
        Group(
            None,
            (
                option(
                    "--ray-address",
                    metavar="HOST:PORT",
                    env=RAY_ADDRESS_ENV,
                    is_required=True,
                    help="the Ray cluster",
                ),
                NAME,
                LOG_LEVEL,
            ),
        ),
    ),
)
