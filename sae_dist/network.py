"""Which of this machine's network interfaces leads to another machine.

gloo listens where this machine's own name points. That is often the loopback (Debian's /etc/hosts), where no other
machine can come; it is told the interface instead.
"""

import os
import socket

import psutil

from sae_dist.config import UserError


def interface_towards(host: str) -> str:
    """The interface that packets to `host` leave by, e.g. eth0; the one that has the address where that is our own.

    UserError where no way leads there. Nothing is sent.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)
            ours = probe.getsockname()[0]
    except OSError as error:
        raise UserError(
            f"no way leads from {socket.gethostname()} to {host} ({error.strerror}); check the network, or the address"
        ) from None
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] == ours for each in addresses):
            return name
    raise UserError(
        f"{socket.gethostname()} reaches {host} from {ours}, which none of its interfaces has; name the interface "
        "in the environment variable GLOO_SOCKET_IFNAME"
    )


def is_ours(address: str) -> bool:
    """Whether one of this machine's interfaces has the address."""
    return any(each.address == address for addresses in psutil.net_if_addrs().values() for each in addresses)


def let_gloo_listen_towards(host: str) -> None:
    """From now on gloo in this process uses the interface towards `host`, unless the environment names one."""
    if "GLOO_SOCKET_IFNAME" not in os.environ:
        os.environ["GLOO_SOCKET_IFNAME"] = interface_towards(host)
