"""Faults of the network between one side (a supervisor) and its servers. Runs in the campaign's or the test's process.

A `Line` is what leads from one side to all brokers, or to both databases: its proxies can be disturbed everywhere. A
`Namespace` is a network of a side's own, with one cable to the brokers and one to the databases: on a cable packets
can vanish, so that nobody is told, neither by a reset nor by an error, which no proxy on loopback can do.

How packets vanish: each end is told a wrong hardware address of the other, so the other end drops what it gets. This
needs no module of the kernel (netem, the drop action of tc and nft are not everywhere), and works in both directions.
Measured: what was held up for 3 s arrives up to 3 s after the partition's end, since TCP doubles its patience.
"""

from __future__ import annotations

import contextlib
import ipaddress
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from chaos.rights import is_stale, owned_name, privileged
from fixtures.proxy import Proxy

RIGHT = "CAP_NET_ADMIN and CAP_SYS_ADMIN (to make network namespaces)"

# Addresses that RFC 2544 sets aside for tests of networks: nobody routes them.
NETWORK = ipaddress.ip_network("198.18.0.0/15")
NOBODY = "02:00:00:00:00:01"

SLOW_BYTES_PER_SECOND = 64_000.0
SLOW_LATENCY_SECONDS = 0.2


# --- a network of one's own -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cable:
    """A pair of interfaces: one end here, one end in a namespace. ``host`` is the address of the end that is here."""

    namespace: str
    here: str
    there: str
    host: str
    guest: str

    @classmethod
    def lay(cls, namespace: str, letter: str, number: int) -> Cable:
        subnet = _free_subnet()
        host, guest = (str(address) for address in subnet.hosts())
        cable = cls(namespace, owned_name(f"{letter}h{number}"), owned_name(f"{letter}g{number}"), host, guest)
        _ip("link", "add", cable.here, "type", "veth", "peer", "name", cable.there, "netns", namespace)
        _ip("addr", "add", f"{host}/{subnet.prefixlen}", "dev", cable.here)
        _ip("link", "set", cable.here, "up")
        _ip("-n", namespace, "addr", "add", f"{guest}/{subnet.prefixlen}", "dev", cable.there)
        _ip("-n", namespace, "link", "set", cable.there, "up")
        cable.mend()
        return cable

    def cut(self) -> None:
        """Let every packet vanish, in both directions, until `mend`."""
        self._tell(NOBODY, NOBODY)

    def mend(self) -> None:
        hardware = Path(f"/sys/class/net/{self.here}/address").read_text().strip()
        answer = _ip("-n", self.namespace, "-o", "link", "show", self.there)
        self._tell(hardware, answer.split("link/ether ")[1].split()[0])

    def _tell(self, of_host: str, of_guest: str) -> None:
        """Tell each end which hardware address the other one has."""
        _ip("neigh", "replace", self.guest, "lladdr", of_guest, "nud", "permanent", "dev", self.here)
        _ip(
            *("-n", self.namespace),
            *("neigh", "replace", self.host, "lladdr", of_host, "nud", "permanent", "dev", self.there),
        )


class Namespace:
    """A network of its own for one side: cables ``to_brokers`` and ``to_databases``, and nothing else.

    Proxies for this side listen on the cables' ``host``. A process gets into it by `command_prefix`, which keeps its
    pid. `close` it after the processes in it have ended.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.name = owned_name(f"n{number}")
        remove_stale_namespaces()
        _ip("netns", "add", self.name)
        try:
            _ip("-n", self.name, "link", "set", "lo", "up")
            self.to_brokers = Cable.lay(self.name, "k", number)
            self.to_databases = Cable.lay(self.name, "d", number)
        except BaseException:
            self.close()
            raise

    @property
    def path(self) -> Path:
        return Path("/run/netns") / self.name

    @property
    def command_prefix(self) -> tuple[str, ...]:
        """What to put before a command so that it runs in here."""
        return ("nsenter", f"--net={self.path}")

    def close(self) -> None:
        """Remove it; the cables go with it."""
        if self.path.exists():
            _ip("netns", "delete", self.name)
        # The kernel takes a namespace apart a moment later; without its own end a cable goes at once.
        for interface in _interfaces():
            if interface in {owned_name(f"kh{self.number}"), owned_name(f"dh{self.number}")}:
                with contextlib.suppress(AssertionError):  # it has gone meanwhile
                    _ip("link", "delete", interface)

    def __enter__(self) -> Namespace:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def remove_stale_namespaces() -> list[str]:
    """Remove what runs that have ended left behind; returns the names."""
    stale = [name for name in map(_first_word, _ip("netns", "list").splitlines()) if is_stale(name)]
    for name in stale:
        with contextlib.suppress(AssertionError):  # another run removed it meanwhile; else it is seen by the next
            _ip("netns", "delete", name)
    for interface in filter(is_stale, _interfaces()):
        with contextlib.suppress(AssertionError):  # it has gone with its namespace
            _ip("link", "delete", interface)
    return stale


def _first_word(line: str) -> str:
    return line.split(maxsplit=1)[0]


def _interfaces() -> list[str]:
    return sorted(path.name for path in Path("/sys/class/net").iterdir())


def _free_subnet() -> ipaddress.IPv4Network:
    """Four addresses that no interface here has; another run may look for some at the same time, so by chance."""
    taken = {ipaddress.ip_address(line.split()[3].split("/")[0]) for line in _ip("-4", "-o", "addr").splitlines()}
    while True:
        first = int(NETWORK.network_address) + 4 * random.randrange(NETWORK.num_addresses // 4)
        subnet = ipaddress.IPv4Network((first, 30))
        if not any(address in subnet for address in taken):
            return subnet


def _ip(*arguments: str) -> str:
    return privileged("ip", *arguments, right=RIGHT)


# --- faults of one side's lines ---------------------------------------------------------------------------------------


class Line:
    """From one side to one kind of server: its proxies, and the cable where the side has a network of its own.

    One fault at a time: `begin` one of `FAULTS`, and `end` it.
    """

    #: What each fault is to those who use the line.
    FAULTS: ClassVar[dict[str, str]] = {
        "cut": "every open connection is reset, once",
        "refuse": "every connection is reset, and new ones are refused",
        "stall": "nothing is forwarded; at the end everything is",
        "half_open": "nothing is forwarded, and at the end every connection turns out to be dead",
        "deaf": "connections are reset; new ones are accepted and never answered",
        "slow": "a slow and late line",
        "vanish": "packets vanish without a word (needs a network namespace)",
    }

    def __init__(self, proxies: Sequence[Proxy], cable: Cable | None = None) -> None:
        self.proxies = list(proxies)
        self.cable = cable
        self.fault: str | None = None

    def possible(self) -> list[str]:
        """The faults that this line can have: nothing vanishes on loopback."""
        return [fault for fault in self.FAULTS if fault != "vanish" or self.cable is not None]

    def begin(self, fault: str, *, only: Sequence[int] | None = None) -> None:
        """Begin a fault, of all proxies or of ``only`` these (a partition from some of the brokers)."""
        assert self.fault is None, f"the line has a fault already: {self.fault}"
        assert fault in self.possible(), f"{fault} is not among {self.possible()}"
        if fault == "vanish":
            assert only is None, "a cable leads to all servers"
            assert self.cable is not None
            self.cable.cut()
        for proxy in self._chosen(only):
            _BEGIN[fault](proxy)
        self.fault = fault

    def end(self) -> None:
        """End the fault, whichever it is."""
        fault, self.fault = self.fault, None
        if self.cable is not None:
            self.cable.mend()
        for proxy in self.proxies:
            if fault == "half_open":
                proxy.cut()
            proxy.heal()

    def _chosen(self, only: Sequence[int] | None) -> list[Proxy]:
        return self.proxies if only is None else [self.proxies[index] for index in only]


_BEGIN: dict[str, Callable[[Proxy], object]] = {
    "cut": Proxy.cut,
    "refuse": Proxy.refuse,
    "stall": Proxy.stall,
    "half_open": Proxy.stall,
    "deaf": Proxy.deaf,
    "slow": lambda proxy: proxy.slow(bytes_per_second=SLOW_BYTES_PER_SECOND, latency_seconds=SLOW_LATENCY_SECONDS),
    "vanish": lambda proxy: None,
}
