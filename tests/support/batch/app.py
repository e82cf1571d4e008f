"""A gateway's application with files and batches, and the service that runs them, on any replicas."""

import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from aiohttp.test_utils import TestClient, TestServer

from cluster.api.app import make_app
from cluster.api.context import CONTEXT
from cluster.api.line_executor import ApiLineExecutor
from cluster.api.stored.executor import ApiExecutor
from cluster.batch.store.open import open_files, open_store
from cluster.gateway.batches import GatewayBatches
from cluster.keys.accounts import Accounts
from cluster.keys.keyring import Keyring
from cluster.keys.ledger import Ledger
from cluster.metrics.gateway import Metrics
from cluster.router.numerics import MAX_WAIT_S
from cluster.router.router import Router
from cluster.system.data_dir import DataDir
from support.servers.live_replica import TEMPLATE, TOKENIZER


@contextlib.asynccontextmanager
async def batch_app(
    data_dir: Path,
    replicas: Sequence[Any],
    *,
    keyring: Keyring | None = None,
    ledger: Ledger | None = None,
    runs: bool = True,
    numerics_wait_s: float = MAX_WAIT_S,
    **options: Any,
) -> AsyncIterator[TestClient]:
    """Yields a client of the application. runs: whether batches are run, or only accepted. options: for make_app."""
    router = Router(replicas, numerics_wait_s=numerics_wait_s)
    batching = GatewayBatches(DataDir(data_dir, model_name="demo"), open_store(data_dir), open_files(data_dir), router)
    metrics = Metrics(router, model_name="demo", batches=lambda: batching.running, responses=batching.response_counts)
    arguments = {"tokenizer": TOKENIZER, "chat_template": TEMPLATE, "model_name": "demo", "metrics": metrics, **options}
    accounts = Accounts()
    app = make_app(router=router, keyring=keyring, accounts=accounts, ledger=ledger, batches=batching.api, **arguments)
    try:
        async with TestClient(TestServer(app)) as client:
            if runs:
                charging: Any = {"keyring": keyring, "accounts": accounts, "ledger": ledger}
                batching.start(ApiLineExecutor(app[CONTEXT], **charging), ApiExecutor(app[CONTEXT], **charging))
            yield client
            await batching.stop()
    finally:
        await batching.close()
