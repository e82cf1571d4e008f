"""The names of deployments: NAME for the only one of a server, NAME.MEMBER for one of several that share their gateways.

Whatever a deployment makes in Ray begins with its name, and NAME alone is the namespace there. The ids of replicas are unique at one
gateway: r0 for the only deployment, chat-r0 for the member `chat`. Knows no Ray.
"""


def full_name(server: str, member: str | None) -> str:
    """The deployment's name. member: its own among several; None for the only one."""
    return server if member is None else f"{server}.{member}"


def server_of(deployment: str) -> str:
    """The name that it shares with the others at its gateways."""
    return deployment.partition(".")[0]


def member_of(deployment: str) -> str | None:
    """Its own name among several; None for the only one."""
    return deployment.partition(".")[2] or None


def replica_prefix(deployment: str) -> str:
    """What the ids of its replicas begin with."""
    member = member_of(deployment)
    return "" if member is None else f"{member}-"
