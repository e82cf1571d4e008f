"""Which network interface leads to an address. Knows Linux's ways to ask; knows no torch and no group."""

import contextlib
import fcntl
import socket
import struct

_SIOCGIFADDR = 0x8915


def interface_towards(address: str) -> str | None:
    """The network interface whose IPv4 address this host would use to reach `address`; None if it cannot be told.

    Gloo would take the address that the host's own name resolves to, which Debian and Ubuntu set to 127.0.1.1:
    no other host can connect to that.
    """
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.connect((address, 9))  # a datagram socket sends nothing here
        local = s.getsockname()[0]
        return next((name for name, ip in addresses().items() if ip == local), None)
    return None


def addresses() -> dict[str, str]:
    """This host's interfaces that have an IPv4 address, in the kernel's order."""
    found: dict[str, str] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an IPv4 address
                request = struct.pack("256s", name.encode()[:15])
                found[name] = socket.inet_ntoa(fcntl.ioctl(s, _SIOCGIFADDR, request)[20:24])
    return found
