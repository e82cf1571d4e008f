"""Addresses, interfaces and ports: whether ranks on different nodes can reach each other. Knows how Gloo and NCCL choose interfaces."""

import ipaddress
from collections.abc import Iterator, Sequence

from cluster.doctor.facts import Link, Network, Node
from cluster.doctor.findings import Finding, ok, problem, warning
from cluster.doctor.judge.ranks import Device

CHECK = "interface"
MAX_LINKS_SHOWN = 4


def judge_network(nodes: Sequence[Node], *, device: Device) -> Iterator[Finding]:
    examined = [node for node in nodes if node.machine is not None]
    # A node that could not be examined is assumed to be another host.
    several_hosts = len({_network(node).stack for node in examined}) > 1 or len(examined) < len(nodes)
    for node in examined:
        yield _judge_interface(node, several_hosts=several_hosts, device=device)


def judge_links(links: Sequence[Link], nodes: Sequence[Node]) -> Iterator[Finding]:
    """links: every pair of nodes that answer, in both directions; empty for a single node."""
    broken = [link for link in links if link.failure is not None]
    if links and not broken:
        yield ok(
            "ports", f"All {len({link.source for link in links})} nodes can reach each other on ports the kernel chose."
        )
    ranges = {_network(n).ephemeral_ports for n in nodes if n.machine is not None} - {None}
    ports = ", ".join(f"{low} to {high}" for low, high in sorted(r for r in ranges if r is not None)) or "all ports"
    for link in broken[:MAX_LINKS_SHOWN]:
        yield problem(
            "ports",
            f"{link.source} cannot reach {link.target} on a port the kernel chose: {link.failure}.",
            f"Open TCP {ports} between the nodes in their security group or firewall; ranks and gateways use these ports.",
            node=link.source,
        )
    if len(broken) > MAX_LINKS_SHOWN:
        rest = broken[MAX_LINKS_SHOWN:]
        pairs = ", ".join(f"{link.source} to {link.target}" for link in rest)
        yield problem(
            "ports", f"{len(rest)} more pairs cannot reach each other: {pairs}.", "Open the same ports between them."
        )


def _judge_interface(node: Node, *, several_hosts: bool, device: Device) -> Finding:
    network, at = _network(node), node.address
    own = next((name for name, ip in network.interfaces.items() if ip == at), None)
    gloo = network.gloo_interface.split(",") if network.gloo_interface else []
    if unknown := [name for name in gloo if name not in network.interfaces]:
        remedy = f"Unset GLOO_SOCKET_IFNAME, or set it to one of {', '.join(network.interfaces)}."
        return problem(
            CHECK, f"GLOO_SOCKET_IFNAME names {unknown[0]}, which does not exist on this host.", remedy, node=at
        )
    if not several_hosts:
        return ok(CHECK, "All ranks are on one host and need no network between them.", node=at)
    restart = f"Restart Ray on this node with --node-ip-address set to an address of this node{_candidates(network)}."
    if _is_loopback(at):
        message = f"Ray knows this node as {at}, which other nodes cannot reach."
        return problem(CHECK, message, restart, node=at)
    if own is None:
        return problem(
            CHECK, f"Ray knows this node as {at}, but none of its interfaces has that address.", restart, node=at
        )
    if gloo and gloo != [own]:
        finding = problem if any(_is_loopback(network.interfaces[name]) for name in gloo) else warning
        remedy = f"Unset GLOO_SOCKET_IFNAME in the environment of `ray start`, or set it to {own}."
        message = f"GLOO_SOCKET_IFNAME names {','.join(gloo)}, but the other nodes reach this one through {own}."
        return finding(CHECK, message, remedy, node=at)
    if device == "cuda" and (others := _nccl_candidates(network, own)):
        remedy = f"Set NCCL_SOCKET_IFNAME={own} in the environment of `ray start`."
        message = f"NCCL may use {', '.join(others)} in addition to {own}, through which the nodes reach each other."
        return warning(CHECK, message, remedy, node=at)
    name = network.hostname_address
    aside = (
        f"; its host name resolves to {name}, which ranks do not use" if name is not None and _is_loopback(name) else ""
    )
    return ok(CHECK, f"Ranks reach other hosts through {own} ({at}){aside}.", node=at)


def _nccl_candidates(network: Network, own: str) -> list[str]:
    """The interfaces NCCL may choose other than `own`. Its rule: all except loopback and docker, or those NCCL_SOCKET_IFNAME selects."""
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
