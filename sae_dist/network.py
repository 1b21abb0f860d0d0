"""Which of this machine's network interfaces leads to another machine.

gloo listens on the address of this machine's host name, often the loopback (Debian's /etc/hosts), which other machines
cannot reach; so it is told the interface.
"""

import os
import socket

import psutil

from sae_dist.config import UserError


def interface_towards(host: str) -> str:
    """The interface of the route to `host`, e.g. eth0; UserError when there is no route. Nothing is sent."""
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
    """Makes gloo in this process use the interface towards `host`, unless GLOO_SOCKET_IFNAME is set."""
    if "GLOO_SOCKET_IFNAME" not in os.environ:
        os.environ["GLOO_SOCKET_IFNAME"] = interface_towards(host)
