"""One browser for all files of this folder, and for each test a page with its own server."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest_asyncio

# Imported in the fixtures: the import skips tests where there is no browser, and a conftest cannot be skipped.


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def browser() -> AsyncIterator[Any]:
    from support.servers.page_site import open_browser

    async with open_browser() as browser:
        yield browser


@pytest_asyncio.fixture(loop_scope="session")
async def site(browser: Any, tmp_path: Path) -> AsyncIterator[Any]:
    from support.servers.page_site import open_site

    async with open_site(browser, tmp_path) as site:
        yield site
