"""Two nodes on one machine: network namespaces with a cable between them, which can be slow, or unplugged."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_CLONE_NEWNET = 0x40000000


class NoNamespaces(Exception):
    """They cannot be made here."""


@dataclass(frozen=True)
class Node:
    """One node: its namespace, and its address on ``eth0``."""

    namespace: str
    address: str

    def enter(self) -> None:
        """Have this process, with one thread, be on the node."""
        descriptor = os.open(f"/run/netns/{self.namespace}", os.O_RDONLY)
        try:
            if ctypes.CDLL(None, use_errno=True).setns(descriptor, _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f"entering {self.namespace}")
        finally:
            os.close(descriptor)
        os.environ |= {"GLOO_SOCKET_IFNAME": "eth0", "TP_SOCKET_IFNAME": "eth0"}

    def unplug(self) -> None:
        """Take its cable out."""
        _ip("-n", self.namespace, "link", "set", "eth0", "down")

    def plug_in(self) -> None:
        """And put it back."""
        _ip("-n", self.namespace, "link", "set", "eth0", "up")

    def slow_down(self, rate_mbit: int) -> str:
        """Make its cable slow; with delay and loss where this kernel has netem. The name of what was used."""
        shape = ["tc", "-n", self.namespace, "qdisc", "replace", "dev", "eth0", "root"]
        netem = [*shape, "netem", "delay", "10ms", "2ms", "loss", "0.5%", "rate", f"{rate_mbit}mbit"]
        if subprocess.run(netem, capture_output=True, check=False).returncode == 0:
            return "netem"
        _run(*shape, "tbf", "rate", f"{rate_mbit}mbit", "burst", "64kb", "latency", "200ms")
        return "tbf"


@contextmanager
def two_nodes() -> Iterator[tuple[Node, Node]]:
    """Two nodes that see each other and nothing else, for as long as the context lasts.

    Raises:
        NoNamespaces: with the reason.
    """
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("tc") is None:
        raise NoNamespaces("network namespaces take root, and `ip` and `tc` of iproute2")
    names = [f"harness-{os.getpid()}-{letter}" for letter in "ab"]
    nodes = tuple(Node(name, f"10.213.7.{number}") for number, name in enumerate(names, 1))
    try:
        for name in names:
            try:
                _ip("netns", "add", name)
            except AssertionError as error:
                raise NoNamespaces(str(error)) from error
        _ip("-n", names[0], "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", names[1])
        for node in nodes:
            _ip("-n", node.namespace, "address", "add", f"{node.address}/24", "dev", "eth0")
            for link in ("lo", "eth0"):
                _ip("-n", node.namespace, "link", "set", link, "up")
        yield nodes[0], nodes[1]
    finally:
        for name in names:
            if Path(f"/run/netns/{name}").exists():
                _ip("netns", "delete", name)


def _ip(*words: str) -> None:
    _run("ip", *words)


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr.strip()}"
