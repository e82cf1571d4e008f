"""Finds and removes a deployment's actors and placement groups in Ray, by name: after a controller's death, and for `tramontane down`.

Knows how replica.py names actors and placement groups: DEPLOYMENT-REPLICA-INCARNATION[-rankN].
"""

import asyncio
import contextlib
import logging
import re
from collections.abc import Collection

import ray
from ray.exceptions import RayError
from ray.util import list_named_actors
from ray.util.placement_group import get_placement_group, placement_group_table, remove_placement_group

from cluster.protocol.names import replica_prefix
from workers.rank.reports import RankDescription

log = logging.getLogger(__name__)

DESCRIBE_TIMEOUT_S = 3.0
Key = tuple[str, str]  # replica id, incarnation


async def find_ranks(deployment: str) -> dict[Key, list[RankDescription]]:
    """Of each (replica id, incarnation), the descriptions of its living ranks in rank order. Ranks that do not answer are left out."""
    names: dict[str, Key] = {}
    for name in sorted(list_named_actors()):
        if (match := _pattern(deployment).fullmatch(name)) is not None and match["rank"] is not None:
            names[name] = match["replica"], match["incarnation"]
    found: dict[Key, list[RankDescription]] = {key: [] for key in names.values()}
    answers = await asyncio.gather(*(_describe(name) for name in names))
    for key, answer in zip(names.values(), answers, strict=True):
        if answer is not None:
            found[key].append(answer)
    return {key: sorted(ranks, key=lambda d: d.rank) for key, ranks in found.items()}


def remove_all(deployment: str, *, keep: Collection[Key] = ()) -> int:
    """Ends every rank and removes every placement group of the deployment except those to keep. Returns how many ranks it ended."""
    names = [name for name in list_named_actors() if is_ours(name, deployment, keep)]
    for name in names:
        with contextlib.suppress(RayError, ValueError):
            ray.kill(ray.get_actor(name))
    for group in placement_group_table().values():
        if is_ours(group["name"], deployment, keep) and group["state"] != "REMOVED":
            with contextlib.suppress(ValueError):
                remove_placement_group(get_placement_group(group["name"]))
    return len(names)


def is_ours(name: str, deployment: str, keep: Collection[Key] = ()) -> bool:
    """Whether this is a rank or a placement group of the deployment, and not of a replica to keep."""
    match = _pattern(deployment).fullmatch(name)
    return match is not None and (match["replica"], match["incarnation"]) not in keep


async def _describe(name: str) -> RankDescription | None:
    with contextlib.suppress(RayError, ValueError, TimeoutError):
        async with asyncio.timeout(DESCRIBE_TIMEOUT_S):
            answer = await ray.get_actor(name).describe.remote()
            return answer if isinstance(answer, RankDescription) else None  # else a rank of version 0.1.0
    return None


def _pattern(deployment: str) -> re.Pattern[str]:
    name, prefix = re.escape(deployment), re.escape(replica_prefix(deployment))
    return re.compile(rf"{name}-(?P<replica>{prefix}r\d+)-(?P<incarnation>[0-9a-f]+)(-apart)?(-rank(?P<rank>\d+))?")
