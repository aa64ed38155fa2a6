"""A network of its own for each node: a namespace with an address, behind a bridge."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence


class Networks:
    """One bridge, which has this machine's end, and a namespace with an `eth0` for each node.

    Args:
        tag: six letters or less, this cluster's own: names of interfaces have at most 15.
        nodes: names of the nodes.
    """

    def __init__(self, tag: str, nodes: Sequence[str]) -> None:
        self.tag, self.nodes = tag, tuple(nodes)
        self.subnet = ""

    @property
    def _bridge(self) -> str:
        return f"br-{self.tag}"

    def namespace(self, node: str) -> str:
        return f"{self.tag}-{self.nodes.index(node)}"

    def interface(self, node: str) -> str:
        """This machine's end of the node's link."""
        return f"v{self.nodes.index(node)}-{self.tag}"

    def address(self, node: str) -> str:
        return f"{self.subnet}.{11 + self.nodes.index(node)}"

    def make(self) -> None:
        """The caller holds the lock (`cluster.only_one`): a subnet that is free stays so."""
        self.subnet = _free_subnet()
        _ip("link", "add", self._bridge, "type", "bridge")
        _ip("addr", "add", f"{self.subnet}.1/24", "dev", self._bridge)
        _ip("link", "set", self._bridge, "up")
        for node in self.nodes:
            inside = ("-n", self.namespace(node))
            _ip("netns", "add", self.namespace(node))
            _ip(*("link", "add", self.interface(node), "type", "veth"), "peer", "name", "eth0", "netns", inside[1])
            _ip("link", "set", self.interface(node), "master", self._bridge, "up")
            _ip(*inside, "addr", "add", f"{self.address(node)}/24", "dev", "eth0")
            for name in ("eth0", "lo"):
                _ip(*inside, "link", "set", name, "up")

    def remove(self) -> None:
        """All that `make` has made, as far as it came."""
        for node in self.nodes:
            _ip("link", "del", self.interface(node), check=False)
            _ip("netns", "del", self.namespace(node), check=False)
        _ip("link", "del", self._bridge, check=False)

    def cut_off(self, node: str) -> None:
        """Take the node's link down."""
        _ip("-n", self.namespace(node), "link", "set", "eth0", "down")

    def join_again(self, node: str) -> None:
        _ip("-n", self.namespace(node), "link", "set", "eth0", "up")

    def impair(self, node: str, *netem: str) -> None:
        """What the node sends is treated as netem says, such as ``delay 200ms loss 5%``; nothing: no more of it."""
        words = ["tc", "-n", self.namespace(node), "qdisc"]
        words += ["replace", "dev", "eth0", "root", "netem", *netem] if netem else ["del", "dev", "eth0", "root"]
        subprocess.run(words, check=True, capture_output=True, text=True)


def _free_subnet() -> str:
    used = _ip("-o", "-4", "addr")
    return next(subnet for number in range(256) if f" {(subnet := f'10.77.{number}')}." not in used)


def _ip(*words: str, check: bool = True) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout
