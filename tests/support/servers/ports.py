"""Which sockets of a running server wait for strangers, and whether others than this machine can reach them."""

import ipaddress
import socket

import psutil

from support.servers.system_server import Server


def listening(server: Server) -> list[tuple[str, str, int]]:
    """Process, address and port of every socket that waits for strangers: TCP that listens, UDP without a peer."""
    found = []
    for process in [psutil.Process(server.process.pid), *server.all_descendants()]:
        try:
            name = name_of(process)
            sockets = process.net_connections("inet")
        except psutil.NoSuchProcess:
            continue
        found += [
            (name, s.laddr.ip, s.laddr.port)
            for s in sockets
            if s.status == psutil.CONN_LISTEN or (s.type == socket.SOCK_DGRAM and not s.raddr)
        ]
    return found


def name_of(process: psutil.Process) -> str:
    if process.name().startswith("python"):
        return next((a.rpartition("/")[2] for a in process.cmdline() if a.endswith(".py")), process.name())
    return process.name().partition(".")[0]


def is_loopback(address: str) -> bool:
    ip = ipaddress.ip_address(address)
    return (getattr(ip, "ipv4_mapped", None) or ip).is_loopback
