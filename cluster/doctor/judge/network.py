"""Addresses, interfaces and ports: can ranks on different nodes find and reach each other. Knows how Gloo and NCCL choose."""

import ipaddress
from collections.abc import Iterator, Sequence

from cluster.doctor.facts import Link, Network, Node
from cluster.doctor.findings import Finding, ok, problem, warning
from cluster.doctor.judge.ranks import Device

CHECK = "interface"
SHOWN_LINKS = 4


def judge_network(nodes: Sequence[Node], *, device: Device) -> Iterator[Finding]:
    seen = [node for node in nodes if node.machine is not None]
    # Nodes that could not be looked at are taken to be elsewhere.
    several = len({_network(node).stack for node in seen}) > 1 or len(seen) < len(nodes)
    for node in seen:
        yield _judge_interface(node, several=several, device=device)


def judge_links(links: Sequence[Link], nodes: Sequence[Node]) -> Iterator[Finding]:
    """links: every pair of nodes that answer, both ways; none on a single node."""
    broken = [link for link in links if link.failure is not None]
    if links and not broken:
        yield ok(
            "ports", f"All {len({link.source for link in links})} nodes reach each other on ports the kernel chose."
        )
    ranges = {_network(n).ephemeral_ports for n in nodes if n.machine is not None} - {None}
    ports = ", ".join(f"{low} to {high}" for low, high in sorted(r for r in ranges if r is not None)) or "all ports"
    for link in broken[:SHOWN_LINKS]:
        yield problem(
            "ports",
            f"{link.source} cannot reach {link.target} on a port the kernel chose: {link.failure}.",
            f"Open TCP {ports} between the nodes, in their security group or firewall: ranks and gateways meet there.",
            node=link.source,
        )
    if len(broken) > SHOWN_LINKS:
        rest = broken[SHOWN_LINKS:]
        pairs = ", ".join(f"{link.source} to {link.target}" for link in rest)
        yield problem("ports", f"{len(rest)} more pairs cannot reach each other: {pairs}.", "As above.")


def _judge_interface(node: Node, *, several: bool, device: Device) -> Finding:
    """several: whether there are ranks elsewhere."""
    network, at = _network(node), node.address
    own = next((name for name, ip in network.interfaces.items() if ip == at), None)
    gloo = network.gloo_interface.split(",") if network.gloo_interface else []
    if unknown := [name for name in gloo if name not in network.interfaces]:
        remedy = f"Unset GLOO_SOCKET_IFNAME, or set it to one of {', '.join(network.interfaces)}."
        return problem(CHECK, f"GLOO_SOCKET_IFNAME names {unknown[0]}, which this host has not.", remedy, node=at)
    if not several:
        return ok(CHECK, "The ranks are on one host: they need no network between them.", node=at)
    address = f"Start Ray there again with --node-ip-address set to an address of its own{_candidates(network)}."
    if _is_loopback(at):
        sentence = f"Ray knows this node as {at}, which means another machine on every node."
        return problem(CHECK, sentence, address, node=at)
    if own is None:
        return problem(CHECK, f"Ray knows this node as {at}, which no interface of it has.", address, node=at)
    if gloo and gloo != [own]:
        what = problem if any(_is_loopback(network.interfaces[name]) for name in gloo) else warning
        remedy = f"Unset GLOO_SOCKET_IFNAME in the environment of `ray start`, or set it to {own}."
        sentence = f"GLOO_SOCKET_IFNAME names {','.join(gloo)}, while the other nodes know this one by {own}."
        return what(CHECK, sentence, remedy, node=at)
    if device == "cuda" and (others := _nccl_candidates(network, own)):
        remedy = f"Set NCCL_SOCKET_IFNAME={own} in the environment of `ray start`."
        sentence = f"NCCL may use {', '.join(others)} beside {own}, over which the nodes know each other."
        return warning(CHECK, sentence, remedy, node=at)
    name = network.hostname_address
    aside = f"; its own name means {name}, which ranks do not use" if name is not None and _is_loopback(name) else ""
    return ok(CHECK, f"Ranks talk to other hosts through {own} ({at}){aside}.", node=at)


def _nccl_candidates(network: Network, own: str) -> list[str]:
    """What NCCL would take beside `own`, by its documented rule: all but loopback and docker, or what its variable selects."""
    chosen = network.nccl_interface
    if chosen is None:
        names = [name for name in network.interfaces if not name.startswith(("lo", "docker"))]
    else:
        exact = "=" in chosen[:2]
        patterns = chosen.lstrip("^=").split(",")
        names = [
            name
            for name in network.interfaces
            if any(name == p if exact else name.startswith(p) for p in patterns) != chosen.startswith("^")
        ]
    return [name for name in names if name != own]


def _candidates(network: Network) -> str:
    found = [f"{ip} ({name})" for name, ip in network.interfaces.items() if not _is_loopback(ip)]
    return f": {' or '.join(found)}" if found else ""


def _network(node: Node) -> Network:
    assert node.machine is not None
    return node.machine.network


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False
