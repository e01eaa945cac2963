"""The network interface through which the ranks of a pool reach each other.

The ranks of one machine use the loopback, whatever the environment says: nobody outside has a part in their pool, and
neither gloo nor NCCL asks who connects. An executor of several hosts would choose an interface on each of them, and
call `bind` with it there. Imports no torch, as the launcher needs none.
"""

from __future__ import annotations

import fcntl
import socket
import struct
from collections.abc import MutableMapping

from ..protocol.pool_errors import PoolError

_SIOCGIFFLAGS, _SIOCGIFADDR = 0x8913, 0x8915  # linux/sockios.h
_IFF_UP, _IFF_LOOPBACK = 0x1, 0x8  # linux/if.h
_LOCALHOST = "127.0.0.1"


class NetworkError(PoolError):
    """The ranks cannot reach each other on this machine as it is."""


def loopback() -> str:
    """The name of this machine's loopback interface.

    Raises:
        NetworkError: there is none that works, which the ranks of a pool need as soon as there are two of them.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        flags = {name: _flags(asked, name) for _, name in socket.if_nameindex()}
        found = [name for name, bits in flags.items() if bits & _IFF_LOOPBACK]
        if not found:
            raise NetworkError(
                "This machine has no loopback network interface, and the workers reach each other through nothing "
                "else. Run ComfyUI where there is one, or set num_gpus to 1."
            )
        name = found[0]
        if not flags[name] & _IFF_UP:
            raise NetworkError(
                f"This machine's loopback network interface ({name}) is down, and the workers reach each other "
                f"through nothing else. Switch it on (as root: ip link set {name} up), or set num_gpus to 1."
            )
        if not _has_ipv4(asked, name):
            raise NetworkError(
                f"This machine's loopback network interface ({name}) has no IPv4 address, and the workers reach each "
                f"other through nothing else. Give it one (as root: ip address add {_LOCALHOST}/8 dev {name}), or set "
                "num_gpus to 1."
            )
    return name


def bind(environment: MutableMapping[str, str], interface: str) -> None:
    """Let everything that listens in processes of this environment listen on `interface` alone.

    What else the environment says to gloo and NCCL stays, such as how NCCL copies between GPUs.
    """
    environment.update(
        GLOO_SOCKET_IFNAME=interface,
        GLOO_DEVICE_TRANSPORT="TCP",  # ibverbs would leave the machine
        TP_SOCKET_IFNAME=interface,
        NCCL_SOCKET_IFNAME=f"={interface}",  # without "=" NCCL takes all interfaces whose names begin so
        NCCL_SOCKET_FAMILY="AF_INET",  # NCCL finds no IPv6 address on a loopback, and fails
        NCCL_OOB_NET_ENABLE="0",  # would meet over InfiniBand, or a plugin's network
        MASTER_ADDR=_LOCALHOST,
    )
    for name in (
        "NCCL_COMM_ID",  # an address at which ranks would meet, on whichever interface has it
        "NCCL_RAS_ADDR",  # where NCCL tells how it is; without, on localhost
        "TORCH_SYMMMEM",  # torch's symmetric memory would meet by NVSHMEM's or NCCL's ways
    ):
        environment.pop(name, None)
    environment.setdefault("NCCL_RAS_ENABLE", "0")  # a port for a tool that nobody has asked for


def _flags(asked: socket.socket, interface: str) -> int:
    answer = fcntl.ioctl(asked, _SIOCGIFFLAGS, struct.pack("16sH14x", interface.encode(), 0))
    return int(struct.unpack("16xH14x", answer)[0])


def _has_ipv4(asked: socket.socket, interface: str) -> bool:
    try:
        fcntl.ioctl(asked, _SIOCGIFADDR, struct.pack("16s24x", interface.encode()))
    except OSError:  # EADDRNOTAVAIL
        return False
    return True
