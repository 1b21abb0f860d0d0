"""The interface that leads to a host: the oracle is the machine's own list of addresses."""

import os
import socket

import psutil
import pytest

from sae_dist.config import UserError
from sae_dist.network import interface_towards, let_gloo_listen_towards

OURS = [
    (name, each.address)
    for name, addresses in psutil.net_if_addrs().items()
    for each in addresses
    if each.family == socket.AF_INET
]


@pytest.mark.parametrize(("name", "address"), OURS)
def test_our_own_address_is_at_the_interface_that_has_it(name: str, address: str):
    assert interface_towards(address) == name


def test_a_name_that_leads_nowhere_is_said(monkeypatch):
    with pytest.raises(UserError, match=r"no way leads from .* to nowhere\.invalid"):
        interface_towards("nowhere.invalid")


def test_an_interface_that_the_environment_names_stays(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "chosen")
    let_gloo_listen_towards("nowhere.invalid")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "chosen"
