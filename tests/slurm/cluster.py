"""A private SLURM of several nodes on this machine: real daemons, without systemd, on free ports, with its own munge.

Plain, the nodes are names of this machine. With networks, each has a network and a host name of its own, and can be
cut off. What an earlier run that was killed has left is cleared away first.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.launching import BIN, environment
from tests.slurm import hosts_file
from tests.slurm.networks import Networks

_ROOT = Path("/tmp")  # below pytest's directories only root may look; a socket's path has at most 107 letters
_PREFIX = "harness-slurm-"
_LIMIT_S = 60.0
# A session is a command too.
_COMMAND_LIMIT_S = 300.0
_POLL_S = 0.1
CPUS_PER_NODE = 8
GPUS_PER_NODE = 4
# After SIGTERM, SLURM's SIGKILL comes so much later: a busy machine needs some of it to save.
KILL_WAIT_S = 25

_CONFIGURATION = """\
ClusterName={tag}
SlurmctldHost={host}({address})
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={directory}/munge/sock,cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool/%n
SlurmctldPidFile={directory}/run/slurmctld.pid
SlurmdPidFile={directory}/run/slurmd-%n.pid
SlurmctldLogFile={directory}/log/slurmctld.log
SlurmdLogFile={directory}/log/slurmd-%n.log
ProctrackType={proctrack}
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=0
SlurmdParameters=config_overrides
ReturnToService=2
MpiDefault=none
JobRequeue=1
KillWait={kill_wait_s}
OverTimeLimit=3
MessageTimeout=30
MinJobAge=3600
InactiveLimit=0
SlurmctldTimeout=60
SlurmdTimeout=10
UnkillableStepTimeout=60
GresTypes=gpu
PropagateResourceLimits=NONE
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO PriorityTier=1 PreemptMode=REQUEUE \
GraceTime={kill_wait_s}
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def why_not(*, has_networks: bool = False) -> str | None:
    """Why there can be no such cluster on this machine; None: there can."""
    if os.geteuid() != 0:
        return "SLURM's daemons need root here"
    programs = [
        "slurmctld",
        "slurmd",
        "sbatch",
        "munged",
        *(["ip", "tc", "nsenter", "unshare"] if has_networks else []),
    ]
    missing = [name for name in programs if shutil.which(name, path=_path()) is None]
    if missing:
        return f"no {', '.join(missing)}: apt-get install slurmctld slurmd slurm-client munge iproute2"
    return None


class Cluster:
    """Started once, and used by many tests.

    Args:
        num_nodes: nodes, each with `CPUS_PER_NODE` cores and `GPUS_PER_NODE` things that SLURM takes for GPUs.
        has_networks: each node has a network and a host name of its own.
        private_dir: with networks, a directory that is another one on each node, as a local disk's is.
    """

    def __init__(self, num_nodes: int = 2, *, has_networks: bool = False, private_dir: Path | None = None) -> None:
        self.tag = secrets.token_hex(3)
        self.directory = _ROOT / f"{_PREFIX}{self.tag}"
        # The form that clusters use, with digits and a hyphen before them: node-a1-[01-02].
        self.nodes = tuple(f"node-{self.tag}-{number:02}" for number in range(1, num_nodes + 1))
        self.networks = Networks(self.tag, self.nodes) if has_networks else None
        self._private_dir = private_dir

    @property
    def variables(self) -> dict[str, str]:
        """What its commands need in their environment."""
        return {"SLURM_CONF": str(self.directory / "slurm.conf")}

    def start(self) -> None:
        with only_one():
            _clear_away_what_is_left()
            for name in ("munge", "state", "log", "run", "private", *(f"spool/{node}" for node in self.nodes)):
                (self.directory / name).mkdir(parents=True)
            (self.directory / "owner.json").write_text(json.dumps([os.getpid(), psutil.Process().create_time()]))
            (self.directory / "nodes.json").write_text(json.dumps(self.nodes))
            if self.networks is not None:
                self.networks.make()
                addresses = {node: self.networks.address(node) for node in self.nodes}
            else:
                addresses = dict.fromkeys(self.nodes, "127.0.0.1")
            hosts_file.add(addresses, self.directory.name)
        self._start_munge()
        self._write_configuration(addresses)
        self._run("slurmctld", "-c", "-f", self.variables["SLURM_CONF"])
        for node in self.nodes:
            self.start_node(node)
        self.until(lambda: len(self.nodes_that_are("idle")) == len(self.nodes), "all nodes to be idle")

    def start_node(self, node: str) -> None:
        """Start the node's daemon."""
        words = ["slurmd", "-f", self.variables["SLURM_CONF"], "-N", node]
        if self.networks is not None:
            own = [f"hostname {node}"]
            if self._private_dir is not None:
                (self.directory / "private" / node).mkdir(exist_ok=True)
                own.append(f"mount --bind {self.private(node)} {self._private_dir}")
            # Not `ip netns exec`: it hides /sys/fs/cgroup.
            words = [
                *("nsenter", f"--net=/run/netns/{self.networks.namespace(node)}", "unshare", "--uts", "--mount"),
                *("sh", "-ec", f"{'; '.join(own)}; exec {' '.join(words)}"),
            ]
        self._run(*words)

    def private(self, node: str) -> Path:
        """Where this machine sees what is `private_dir` on a node."""
        return self.directory / "private" / node

    def stop(self) -> None:
        with only_one():
            _dismantle(self.directory)

    # ---------------------------------------------------------------------- its commands

    def command(self, *words: str | Path, cwd: Path | None = None, extra: Mapping[str, str] | None = None) -> str:
        """Run one of SLURM's commands, or any other that talks to it; what it prints.

        Raises:
            AssertionError: if it fails, with what it says.
        """
        done = subprocess.run(
            [str(word) for word in words],
            cwd=cwd,
            env=environment({**self.variables, "PATH": _path(), **(extra or {})}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_COMMAND_LIMIT_S,
        )
        assert done.returncode == 0, f"{words}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def nodes_that_are(self, state: str) -> list[str]:
        return self.command("sinfo", "-h", "-N", "-p", "main", "-t", state, "-o", "%N").split()

    def state(self, job: str) -> str:
        """RUNNING, PENDING, COMPLETED, ..."""
        return self.command("squeue", "-h", "-t", "all", "-j", job, "-o", "%T").strip()

    def facts(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        words = self.command("scontrol", "-o", "show", "job", job).split()
        return {name: value for name, _, value in (word.partition("=") for word in words)}

    def until(self, condition: Callable[[], object], what: str, limit_s: float = _LIMIT_S) -> None:
        """Wait for what SLURM does by itself, and tells nobody of.

        Raises:
            AssertionError: if it has not come in time.
        """
        deadline_s = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < deadline_s, (
                f"waited {limit_s} s for {what}\n{self.command('squeue', '-t', 'all')}"
            )
            time.sleep(_POLL_S)

    def until_over(self, job: str, limit_s: float = 120.0) -> str:
        """Wait for the end of a job; its last state."""
        self.until(lambda: self.state(job) in _LAST_STATES, f"the end of job {job}", limit_s)
        return self.state(job)

    def put_right(self) -> None:
        """Cancel every job, wait until nothing of them runs, and have all nodes back."""
        _cancel_all(self.directory)
        for node in self.nodes_that_are("drain,down"):
            self.command("scontrol", "update", f"NodeName={node}", "State=RESUME")

    # ---------------------------------------------------------------------- its daemons

    def _start_munge(self) -> None:
        directory = self.directory / "munge"
        (directory / "key").write_bytes(os.urandom(128))
        (directory / "key").chmod(0o400)
        for path in (directory, directory / "key"):
            shutil.chown(path, "munge", "munge")
        for path in (self.directory, directory):
            path.chmod(0o755)
        files = {"socket": "sock", "key-file": "key", "log-file": "log", "pid-file": "pid", "seed-file": "seed"}
        options = [f"--{name}={directory / file}" for name, file in files.items()]
        self._run("runuser", "-u", "munge", "--", shutil.which("munged", path=_path()), "--force", *options)
        words = ["munge", "-S", str(directory / "sock"), "-n"]
        self.until(lambda: subprocess.run(words, capture_output=True).returncode == 0, "munge to answer")

    def _write_configuration(self, addresses: Mapping[str, str]) -> None:
        host = socket.gethostname()
        controller = "127.0.0.1" if self.networks is None else f"{self.networks.subnet}.1"
        ports = _free_ports(1 + len(self.nodes))
        hardware = f"CPUs={CPUS_PER_NODE} CoresPerSocket={CPUS_PER_NODE} Sockets=1 ThreadsPerCore=1 RealMemory=8000"
        nodes = [
            f"NodeName={node} NodeHostname={host if self.networks is None else node} NodeAddr={addresses[node]} "
            f"Port={port} {hardware} Gres=gpu:{GPUS_PER_NODE} State=UNKNOWN"
            for node, port in zip(self.nodes, ports[1:], strict=True)
        ]
        # Any other loses processes whose parent has ended.
        has_cgroups = Path("/sys/fs/cgroup/freezer").is_dir()
        (self.directory / "slurm.conf").write_text(
            _CONFIGURATION.format(
                tag=self.tag,
                host=host,
                address=controller,
                port=ports[0],
                directory=self.directory,
                proctrack="proctrack/cgroup" if has_cgroups else "proctrack/linuxproc",
                kill_wait_s=KILL_WAIT_S,
                nodes="\n".join(nodes),
            )
        )
        (self.directory / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
        for number in range(GPUS_PER_NODE):
            # It takes nothing but devices; these are /dev/null's.
            os.mknod(self.directory / f"run/gpu{number}", 0o20666, os.makedev(1, 3))
        files = f"{self.directory}/run/gpu[0-{GPUS_PER_NODE - 1}]"
        (self.directory / "gres.conf").write_text(f"NodeName={','.join(self.nodes)} Name=gpu File={files}\n")

    def _run(self, *words: str | None) -> None:
        """Start what becomes a daemon by itself."""
        log = self.directory / "log/started.log"
        with log.open("a") as output:
            done = subprocess.run(
                [str(word) for word in words],
                env=environment({**self.variables, "PATH": _path()}),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=_LIMIT_S,
            )
        assert done.returncode == 0, f"{words}\n{log.read_text()}"


_LAST_STATES = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", ""}


@contextmanager
def only_one() -> Iterator[None]:
    """One at a time on this machine: for what several clusters change."""
    with (_ROOT / f"{_PREFIX}lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _clear_away_what_is_left() -> None:
    """Clusters whose test process has ended without stopping them."""
    for directory in _ROOT.glob(f"{_PREFIX}*/"):
        try:
            pid, created_s = json.loads((directory / "owner.json").read_text())
            is_alive = psutil.pid_exists(pid) and psutil.Process(pid).create_time() == created_s
        except (OSError, ValueError, psutil.NoSuchProcess):
            is_alive = False
        if not is_alive:
            _dismantle(directory)


def _dismantle(directory: Path) -> None:
    """End what runs in a cluster's directory, and remove all that it has left on this machine."""
    _cancel_all(directory)
    daemons = [*sorted(directory.glob("run/slurmd-*.pid")), directory / "run/slurmctld.pid", directory / "munge/pid"]
    for file in daemons:
        _end(file)
    tag = directory.name.removeprefix(_PREFIX)
    nodes = directory / "nodes.json"
    if nodes.exists() and shutil.which("ip", path=_path()):
        Networks(tag, json.loads(nodes.read_text())).remove()
    hosts_file.remove(directory.name)
    shutil.rmtree(directory)


def _cancel_all(directory: Path) -> None:
    variables = environment({"SLURM_CONF": str(directory / "slurm.conf"), "PATH": _path()})
    deadline_s = time.monotonic() + KILL_WAIT_S + 10
    if _daemon(directory / "run/slurmctld.pid") is None:
        return
    subprocess.run(["scancel", "-u", "root"], env=variables, capture_output=True, timeout=60)
    words = ["squeue", "-h", "-o", "%i"]
    while time.monotonic() < deadline_s:
        if not subprocess.run(words, env=variables, capture_output=True, timeout=60).stdout.strip():
            return
        time.sleep(_POLL_S)


def _end(pid_file: Path) -> None:
    process = _daemon(pid_file)
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process is None:
            return
        process.send_signal(number)
        deadline_s = time.monotonic() + 10
        while (process := _daemon(pid_file)) is not None and time.monotonic() < deadline_s:
            time.sleep(0.02)


def _daemon(pid_file: Path) -> psutil.Process | None:
    """The process, where it runs and the number is not somebody else's by now."""
    try:
        process = psutil.Process(int(pid_file.read_text()))
        is_it = process.name() in ("slurmd", "slurmctld", "munged") and process.status() != psutil.STATUS_ZOMBIE
    except (OSError, ValueError, psutil.NoSuchProcess):
        return None
    return process if is_it else None


def _path() -> str:
    # Debian keeps daemons from a user's path.
    return f"{BIN}:{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
