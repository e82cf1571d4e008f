"""A gateway with several deployments: which of them a replica, an adapter or a batch belongs to, and all of them as one view."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from support.fakes.replica import FakeReplica, tokens

from cluster.adapters.served import ServedAdapters
from cluster.gateway.batch_shares import BatchShares
from cluster.gateway.joined_view import joined_view
from cluster.gateway.operator import Operator
from cluster.protocol.adapters import Adapter, AdapterRevision, Registry, RevisionState
from cluster.protocol.names import full_name, member_of, replica_prefix, server_of
from cluster.protocol.report import BatchDemand
from cluster.protocol.view import (
    ClusterView,
    GatewayRecord,
    NodeNotice,
    ReplicaRecord,
    ReplicaState,
    StartFailure,
)
from cluster.router.router import Router
from workers.errors import RequestError
from workers.protocol import BATCH_PRIORITY

SQL = AdapterRevision(id="sql@1", name="sql", source="/sql", digest="1", rank=8, num_bytes=1, state=RevisionState.READY)


def view_of(member: str, *, gateway: tuple[int, int] = (1, 2), **fields: Any) -> ClusterView:
    """One replica, ready."""
    record = ReplicaRecord(replica_id=f"{member}-r0", incarnation="a", state=ReplicaState.READY)
    gateways = (GatewayRecord(gateway_id="g", url="u", node_id="n", num_running=gateway[0], num_queued=gateway[1]),)
    defaults = {"version": 5, "controller_id": member, "replicas": (record,), "gateways": gateways, "num_desired": 1}
    return ClusterView(**(defaults | fields))


class FakeDeployment:
    """As much of a Deployment as an operator asks for; `asked` by method."""

    def __init__(self, member: str, *, adapters: bool = True, registry: Registry | None = None) -> None:
        self.name = f"team.{member}"
        self.view = view_of(member)
        self.asked: list[tuple[Any, ...]] = []
        self.served = ServedAdapters()
        if registry is not None:
            self.served.update(registry)
        self.config = SimpleNamespace(model_name=member, engine=SimpleNamespace(enable_lora=adapters))
        self.controller = self.adapters = self

    async def drain(self, replica_id: str, grace_s: float | None) -> None:
        self.asked.append(("drain", replica_id, grace_s))

    async def load(self, name: str, source: str, **options: Any) -> AdapterRevision:
        self.asked.append(("load", name))
        return SQL

    async def change(self, change: str, name: str) -> Registry:
        self.asked.append((change, name))
        return Registry()


def test_names() -> None:
    assert (full_name("team", None), full_name("team", "chat")) == ("team", "team.chat")
    assert [server_of(name) for name in ("team", "team.chat")] == ["team", "team"]
    assert [member_of(name) for name in ("team", "team.chat")] == [None, "chat"]
    assert [replica_prefix(name) for name in ("team", "team.chat")] == ["", "chat-"]


def test_a_single_view_is_as_it_is_and_several_are_one() -> None:
    chat = view_of("chat", gateway=(1, 2), num_desired=2, facts=None)
    assert joined_view([]) is None
    assert joined_view([("team", chat)]) is chat
    notice = NodeNotice(node_id="n", node_ip="i", is_head=False, source="aws", cause="", deadline=1.0, seen_at=0.0)
    failure = StartFailure(kind="config", message="No room.")
    code = view_of("code", gateway=(3, 4), notices=(notice,), num_notices_total=1, failure=failure)
    both = joined_view([("team.chat", replace(chat, notices=(notice,))), ("team.code", code)])
    assert both is not None
    assert [r.replica_id for r in both.replicas] == ["chat-r0", "code-r0"]
    assert [(g.num_running, g.num_queued) for g in both.gateways] == [(4, 6)], "one gateway, which serves both"
    assert (both.notices, both.num_notices_total, both.num_desired) == ((notice,), 1, 3)
    assert str(both.failure) == "code: No room."
    assert [(d.name, d.replica_ids, d.num_desired) for d in both.deployments] == [
        ("chat", ("chat-r0",), 2),
        ("code", ("code-r0",), 1),
    ]


async def test_a_replica_is_drained_by_its_own_controller() -> None:
    chat, code = FakeDeployment("chat"), FakeDeployment("code")
    await Operator([chat, code]).drain_replica("code-r0", 3.0)  # type: ignore[list-item]  # fakes
    assert (chat.asked, code.asked) == ([], [("drain", "code-r0", 3.0)])
    with pytest.raises(RequestError, match="The replicas are: chat-r0, code-r0"):
        await Operator([chat, code]).drain_replica("r0", None)  # type: ignore[list-item]


async def test_an_adapter_goes_to_the_model_it_belongs_to() -> None:
    registry = Registry(adapters=(Adapter(name="sql", current="sql@1"),), revisions=(SQL,))
    chat, code = FakeDeployment("chat", registry=registry), FakeDeployment("code")
    operator = Operator([chat, code])  # type: ignore[list-item]
    with pytest.raises(RequestError, match="Send 'chat' or 'code' as 'base_model_name'"):
        await operator.load_adapter("new", "/new")
    await operator.load_adapter("new", "/new", base_model="code")
    assert (chat.asked, code.asked.pop()) == ([], ("load", "new"))
    await operator.load_adapter("sql", "/newer", in_place=True)
    assert (chat.asked.pop(), code.asked) == (("load", "sql"), []), "a revision goes to where the adapter is"
    for name in ("sql", "chat"):
        with pytest.raises(RequestError, match="is a name of the deployment of 'chat'"):
            await operator.load_adapter(name, "/x", base_model="code")
    await operator.change_adapter("unload", "sql")
    assert (chat.asked, code.asked) == ([("unload", "sql")], [])
    only = Operator([FakeDeployment("chat", adapters=False), code])  # type: ignore[list-item]
    await only.load_adapter("new", "/new")
    assert code.asked == [("load", "new")], "only one of them has adapters"


async def test_a_batch_counts_where_its_lines_are() -> None:
    routers = [Router([FakeReplica(tokens([3]))]) for _ in range(2)]
    models: Any = [
        SimpleNamespace(router=router, serves=lambda name, own=own: name == own, knows=lambda name: False)
        for router, own in zip(routers, ("chat", "code"), strict=True)
    ]
    shares = BatchShares(models)
    one, mixed = BatchDemand(batch_id="one", remaining_tokens=10), BatchDemand(batch_id="mixed", remaining_tokens=20)

    def reported() -> list[list[str]]:
        shares.report([("code", one), (None, mixed)])
        return [[demand.batch_id for demand in router.batches] for router in routers]

    assert reported() == [[], ["one"]], "which models the mixed one needs is not known yet"
    with routers[0].admit(1, priority=BATCH_PRIORITY):
        assert reported() == [["mixed"], ["one"]]
    assert reported() == [["mixed"], ["one"]], "it counts until it ends, so that its replicas stay"
    shares.report([])
    assert [router.batches for router in routers] == [(), ()]
    assert reported() == [[], ["one"]]
