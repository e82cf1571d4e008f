"""What `serve --profile` adds to a running server."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING

from cluster.profile.file import ProfileFile
from cluster.terminal.phases import Console

if TYPE_CHECKING:
    from cluster.gateway.gateway import Gateway


async def start_profile(
    file: ProfileFile | None,
    gateway: "Gateway",
    *,
    console: Console,
    stack: contextlib.AsyncExitStack,
    stop_now: asyncio.Event,
) -> Callable[[], Awaitable[None]]:
    """Records from the next request on; without a file, nothing. Returns what ends the recording and waits for its file, or for
    `stop_now`.

    What it opens is closed by `stack`.
    """
    if file is None:
        return _nothing
    from cluster.gateway.profile import Profile

    profile = Profile(file, lambda: gateway.view, say=console.line)
    stack.push_async_callback(profile.close)
    await profile.start()
    return partial(profile.finish, stop_now)


async def _nothing() -> None:
    pass
