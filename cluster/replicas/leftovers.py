"""Finds and removes what a deployment has in Ray by its names: after a controller's death, and for `tramontane down`.

Knows how replica.py names actors and placement groups: DEPLOYMENT-REPLICA-INCARNATION[-rankN].
"""

import asyncio
import contextlib
import logging
import re
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util import list_named_actors
from ray.util.placement_group import get_placement_group, placement_group_table, remove_placement_group

log = logging.getLogger(__name__)

DESCRIBE_TIMEOUT_S = 3.0


async def find_ranks(deployment: str) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """What the living ranks of each (replica id, incarnation) say of themselves, in rank order; silent ones are left out."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for name in sorted(list_named_actors()):
        if (match := _pattern(deployment).fullmatch(name)) is None or match["rank"] is None:
            continue
        descriptions = found.setdefault((match["replica"], match["incarnation"]), [])
        with contextlib.suppress(RayError, ValueError, TimeoutError):
            async with asyncio.timeout(DESCRIBE_TIMEOUT_S):
                descriptions.append(await ray.get_actor(name).describe.remote())
    return {key: sorted(ranks, key=lambda d: d["rank"]) for key, ranks in found.items()}


def remove_all(deployment: str) -> int:
    """Ends every rank and gives back every placement group of the deployment. Returns how many ranks there were."""
    pattern = _pattern(deployment)
    names = [name for name in list_named_actors() if pattern.fullmatch(name)]
    for name in names:
        with contextlib.suppress(RayError, ValueError):
            ray.kill(ray.get_actor(name))
    for group in placement_group_table().values():
        if pattern.fullmatch(group["name"]) and group["state"] != "REMOVED":
            with contextlib.suppress(ValueError):
                remove_placement_group(get_placement_group(group["name"]))
    return len(names)


def _pattern(deployment: str) -> re.Pattern[str]:
    return re.compile(
        re.escape(deployment) + r"-(?P<replica>r\d+)-(?P<incarnation>[0-9a-f]+)(-apart)?(-rank(?P<rank>\d+))?"
    )
