"""`tramontane adapters list`, `load`, `unload`, `promote` and `rollback`: what an operator does with a running server's adapters.

Asks one gateway over HTTP, which acts for the whole deployment. Knows the endpoints and what is printed.
"""

import json
from argparse import Namespace
from datetime import datetime
from pathlib import Path
from urllib.parse import quote

import msgspec
from rich.table import Table

from cluster.adapters.registry import find_revision
from cluster.cli.client import Client
from cluster.protocol.adapters import Adapter, AdapterRevision, Registry
from cluster.terminal.tables import answer_console, plain_table
from workers.errors import RequestError

LOAD_TIMEOUT_S = 360.0  # a Hub id is downloaded first
_NOTHING = "–"


def list_adapters(args: Namespace) -> None:
    with _client(args) as client:
        registry = client.get("/admin/adapters", Registry)
    if args.json:
        print(json.dumps(msgspec.to_builtins(registry), indent=2))
    elif not registry.revisions:
        print("No adapters are loaded. `tramontane adapters load NAME PATH` loads one.")
    else:
        answer_console().print(table_of(registry))


def load(args: Namespace) -> None:
    """A folder is named as the server sees it: relative to where this command runs, if it is there."""
    source = str(Path(args.source).absolute()) if Path(args.source).is_dir() else args.source
    body = {"lora_name": args.adapter, "lora_path": source, "load_inplace": True}
    if args.canary is not None:
        body["canary"] = args.canary
    if args.base_model is not None:
        body["base_model_name"] = args.base_model
    with _client(args, timeout_s=LOAD_TIMEOUT_S) as client:
        client.post_text("/v1/load_lora_adapter", body)
        adapter = _find(client, args.adapter)
    if args.canary is None:
        print(f"{args.adapter} serves {adapter.current} on all replicas.")
    else:
        print(
            f"{args.adapter} serves its canary {adapter.canary} for {100 * adapter.canary_share:g} % of new requests, and "
            f"{adapter.current} for the others. `tramontane adapters promote` or `rollback` ends this."
        )


def unload(args: Namespace) -> None:
    with _client(args) as client:
        client.post_text("/v1/unload_lora_adapter", {"lora_name": args.adapter})
    print(f"{args.adapter} is unloaded. Running streams end on it.")


def promote(args: Namespace) -> None:
    with _client(args) as client:
        adapter = client.post(f"/admin/adapters/{quote(args.adapter)}/promote", {}, Adapter)
    before = f" {adapter.previous} stays loaded for `tramontane adapters rollback`." if adapter.previous else ""
    print(f"{args.adapter} serves {adapter.current} for all new requests.{before}")


def rollback(args: Namespace) -> None:
    with _client(args) as client:
        adapter = client.post(f"/admin/adapters/{quote(args.adapter)}/rollback", {}, Adapter)
    print(f"{args.adapter} serves {adapter.current} for all new requests.")


def table_of(registry: Registry) -> Table:
    """One row for each revision, in the order of their names."""
    table = plain_table()
    for name in ("Adapter", "Revision", "State", "Serves", "From"):
        table.add_column(name)
    for name in ("Rank", "MB", "Loaded"):
        table.add_column(name, justify="right", no_wrap=True)
    for revision in sorted(registry.revisions, key=lambda r: (r.name, r.loaded_at or 0.0)):
        state = revision.state.value if revision.reason is None else f"{revision.state.value}: {revision.reason}"
        loaded = _NOTHING if revision.loaded_at is None else f"{datetime.fromtimestamp(revision.loaded_at):%d %b %H:%M}"
        size = f"{revision.num_bytes / 1e6:.1f}"
        role = role_of(registry, revision) or _NOTHING
        table.add_row(revision.name, revision.digest, state, role, revision.source, str(revision.rank), size, loaded)
    return table


def role_of(registry: Registry, revision: AdapterRevision) -> str | None:
    """Which new requests get it: "all", "90 %", or what else it is for."""
    adapter = next((a for a in registry.adapters if a.name == revision.name), None)
    if adapter is None or revision.id not in (adapter.current, adapter.canary, adapter.previous):
        return None
    canary = find_revision(registry, adapter.canary or "")
    share = 0.0 if canary is None else adapter.canary_share
    if revision.id == adapter.canary:
        return f"{100 * share:g} % (canary)"
    if revision.id == adapter.current:
        return f"{100 * (1 - share):g} %" if share else "all"
    return "rollback"


def _find(client: Client, name: str) -> Adapter:
    registry = client.get("/admin/adapters", Registry)
    adapter = next((a for a in registry.adapters if a.name == name), None)
    if adapter is None:
        raise RequestError(f"The adapter {name!r} was unloaded again.")
    return adapter


def _client(args: Namespace, timeout_s: float = 30.0) -> Client:
    return Client(args.url, api_key=args.api_key, ca_cert=args.ca_cert, timeout_s=timeout_s)
