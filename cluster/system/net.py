"""Addresses and ports: which addresses only this machine can reach, whether a port is free, a server's URL for a browser here."""

import ipaddress
import socket

from workers.errors import ConfigError


def url_of(host: str, port: int, *, scheme: str = "http") -> str:
    """The URL at which a browser on this machine reaches a server bound to `host`."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"{scheme}://{shown}:{port}"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server bound to `host`; a name counts if every address of it is loopback."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        pass
    try:
        addresses = {info[4][0] for info in socket.getaddrinfo(host, None)} if host else set()
    except OSError as e:
        raise ConfigError(
            f"--host {host} is neither an address nor a name that resolves.",
            remedy="Give an address of this machine, such as 0.0.0.0.",
            param="--host",
        ) from e
    return bool(addresses) and all(ipaddress.ip_address(a).is_loopback for a in addresses)


def check_port_is_free(host: str, port: int, *, shared: bool = False) -> None:
    """Raises ConfigError when the port is in use, before start-up takes minutes."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            s.bind((host, port))
        except OSError as e:
            raise ConfigError(
                f"Port {port} on {host} cannot be used ({e.strerror}).",
                remedy="Choose another with --port.",
                param="--port",
            ) from e
