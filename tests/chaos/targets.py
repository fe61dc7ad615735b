"""What can be killed: the processes of a study, found by their sessions, and the nodes of a Ray cluster of our own."""

import contextlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from raydml.study.cluster import _protect_token


def processes():
    """Pid -> (parent, session, command line) of every process that runs and is no zombie."""
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        with contextlib.suppress(OSError, IndexError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace").strip()
            if fields[0] != "Z":
                found[int(folder.name)] = (int(fields[1]), int(fields[3]), words)
    return found


def kill(pid, number=signal.SIGKILL):
    """Send a signal to a process, and return whether it was there."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def driver_of(command):
    """The driver that a command has started, or None."""
    children = [pid for pid, (parent, _, words) in processes().items() if parent == command and words.endswith("drive")]
    return children[0] if children else None


def members(sessions, role):
    """The processes of some sessions with a role: ``gcs``, ``raylet``, ``trial`` (any worker that has work)."""
    words_of = {
        "gcs": lambda words: "gcs_server" in words.split(" ")[0],
        "raylet": lambda words: words.split(" ")[0].endswith("raylet/raylet"),
        "trial": lambda words: words.startswith("ray::") and "IDLE" not in words and "Agent" not in words,
    }[role]
    return [pid for pid, (_, session, words) in processes().items() if session in sessions and words_of(words)]


class Cluster:
    """A Ray cluster on this machine: a head without CPUs and nodes of one CPU each.

    auth: its RAY_AUTH_MODE. has_jobs: whether it has Ray's job server, at the address ``jobs``; needs `ray[default]`.
    """

    def __init__(self, folder, num_nodes=2, auth="token", has_jobs=False):
        self.folder, self._num_nodes, self._auth, self._has_jobs = folder, num_nodes, auth, has_jobs
        self.head, self.nodes = None, []
        self._sockets = tempfile.mkdtemp(prefix="ray-") if has_jobs else ""  # with a short path
        with socket.socket() as probe, socket.socket() as other:
            probe.bind(("127.0.0.1", 0))
            other.bind(("127.0.0.1", 0))
            self.port, self._dashboard_port = probe.getsockname()[1], other.getsockname()[1]
        self.address, self.jobs = f"127.0.0.1:{self.port}", f"http://127.0.0.1:{self._dashboard_port}"

    def _node(self, *arguments, mounts=()):
        ray = Path(sys.executable).with_name("ray")
        command = [str(ray), "start", "--block", "--disable-usage-stats", *arguments]
        environment = self.environment()
        if self._has_jobs:  # Ray gives a job the address of the cluster that was started last below this folder
            environment["RAY_TMPDIR"] = self._sockets
            with socket.socket() as probe:  # all nodes of a machine have the same by default
                probe.bind(("127.0.0.1", 0))
                command += ["--dashboard-agent-listen-port", str(probe.getsockname()[1])]
        if mounts:
            binds = " && ".join(f"mount --bind {shlex.quote(str(a))} {shlex.quote(str(b))}" for a, b in mounts)
            command = ["unshare", "--mount", "sh", "-c", f"{binds} && exec {shlex.join(command)}"]
        for _ in range(5):  # several on one machine draw their ports at random, and may meet
            log = self.folder / f"node-{len(list(self.folder.glob('node-*'))):03d}.txt"
            with open(log, "wb") as output:
                node = subprocess.Popen(
                    command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env=environment
                )
            deadline = time.monotonic() + 60
            while node.poll() is None and time.monotonic() < deadline:
                if b"Ray runtime started" in log.read_bytes():
                    return node
                time.sleep(0.1)
            node.kill()
            node.wait(30)
        raise AssertionError(f"a node of Ray does not start:\n{log.read_text()[-2000:]}")

    def environment(self):
        """The environment of its nodes, and of commands that talk to it."""
        return {**os.environ, "RAY_AUTH_MODE": self._auth}

    def start(self):
        """Start what does not run: the head with all nodes, or the nodes that are missing."""
        _protect_token()  # makes it, where no study on this machine has
        if self.head is None or self.head.poll() is not None:
            self.stop()
            dashboard = ["--include-dashboard", str(self._has_jobs).lower()]
            dashboard += ["--dashboard-host", "127.0.0.1", "--dashboard-port", str(self._dashboard_port)]
            self.head = self._node("--head", "--port", str(self.port), "--num-cpus", "0", *dashboard)
        self.nodes = [node for node in self.nodes if node.poll() is None]
        while len(self.nodes) < self._num_nodes:
            self.nodes.append(self._node("--address", self.address, "--num-cpus", "1"))

    def add_node(self, *arguments, mounts=()):
        """Start one more node. mounts: pairs of folders; for the node the first is in the place of the second."""
        self.nodes.append(self._node("--address", self.address, "--num-cpus", "1", *arguments, mounts=mounts))

    def sessions(self):
        return {node.pid for node in (self.head, *self.nodes) if node is not None}

    @staticmethod
    def kill_node(node):
        """Kill all processes of a node at once, as the loss of its machine does."""
        for pid in [pid for pid, (_, session, _) in processes().items() if session == node.pid]:
            kill(pid)
        node.wait(30)

    def stop(self):
        for node in filter(None, (self.head, *self.nodes)):
            self.kill_node(node)
        self.head, self.nodes = None, []
        if self._sockets:
            shutil.rmtree(self._sockets, ignore_errors=True)
