"""What can be killed: the processes of a study, found by their sessions, and the nodes of a Ray cluster of our own."""

import contextlib
import json
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
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
    children = [pid for pid, (parent, _, words) in processes().items() if parent == command and " drive" in words]
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
    max_workers: how many nodes Ray's autoscaler may start besides, for what waits; it ends them after IDLE_S.
    variables: of the environment of all nodes, beside that of this process.
    """

    IDLE_S = 4.0

    def __init__(self, folder, num_nodes=2, auth="token", has_jobs=False, max_workers=0, variables=None):
        self.folder, self._num_nodes, self._auth, self._has_jobs = folder, num_nodes, auth, has_jobs
        self._max_workers, self._variables = max_workers, dict(variables or {})
        self.head, self.nodes = None, []
        self._scratch = Path(tempfile.gettempdir()) / f"ray-{secrets.token_hex(4)}"  # a short path, for sockets
        with socket.socket() as probe, socket.socket() as other:
            probe.bind(("127.0.0.1", 0))
            other.bind(("127.0.0.1", 0))
            self.port, self._dashboard_port = probe.getsockname()[1], other.getsockname()[1]
        self.address, self.jobs = f"127.0.0.1:{self.port}", f"http://127.0.0.1:{self._dashboard_port}"

    def _node(self, *arguments, mounts=(), variables=None):
        ray = Path(sys.executable).with_name("ray")
        command = [str(ray), "start", "--block", "--disable-usage-stats", *arguments]
        environment = self.environment() | (variables or {})
        if self._has_jobs:  # Ray gives a job the address of the cluster that was started last below this folder
            environment["RAY_TMPDIR"] = str(self._scratch)
            with socket.socket() as probe:  # all nodes of a machine have the same by default
                probe.bind(("127.0.0.1", 0))
                command += ["--dashboard-agent-listen-port", str(probe.getsockname()[1])]
        if "--head" not in arguments:
            # Nodes of one folder unpack the driver's code into the same place, and remove it there before.
            command += ["--temp-dir", tempfile.mkdtemp(dir=self._scratch, prefix="")]
        if mounts:
            binds = " && ".join(f"mount --bind {shlex.quote(str(a))} {shlex.quote(str(b))}" for a, b in mounts)
            command = ["unshare", "--mount", "sh", "-c", f"{binds} && exec {shlex.join(command)}"]
        for _ in range(5):  # several on one machine draw their ports at random, and may meet
            with tempfile.NamedTemporaryFile(dir=self.folder, prefix="node-", suffix=".txt", delete=False) as output:
                log = Path(output.name)
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
        return {**os.environ, "RAY_AUTH_MODE": self._auth, **self._variables}

    def _autoscaler(self):
        """The arguments and the variables of a head with an autoscaler.

        It is the one that `ray up` starts, version 2; its nodes are processes of this machine. Ray's own class
        AutoscalingCluster ends all other Rays of the machine first, and needs a file that the installed Ray lacks.
        """
        from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FAKE_HEAD_NODE_TYPE

        from tests.chaos.fake_nodes import FakeNodes

        worker = {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": self._max_workers}
        config = {
            "cluster_name": "fake",
            "max_workers": self._max_workers,
            "idle_timeout_minutes": self.IDLE_S / 60,
            "provider": {
                "type": "external",
                "module": f"{FakeNodes.__module__}.{FakeNodes.__name__}",
                "gcs_address": self.address,
                "head_node_id": FAKE_HEAD_NODE_ID,
                "launch_multiple": True,
            },
            "head_node_type": FAKE_HEAD_NODE_TYPE,
            "available_node_types": {
                FAKE_HEAD_NODE_TYPE: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
                "worker": worker,
            },
            # Nothing has to be done on these machines; of a provider like this one Ray has no defaults.
            "setup_commands": [],
            "head_setup_commands": [],
            "worker_setup_commands": [],
            "cluster_synced_files": [],
        }
        (self.folder / "autoscaler.json").write_text(json.dumps(config))  # JSON is YAML
        return ["--autoscaling-config", str(self.folder / "autoscaler.json")], {
            "RAY_FAKE_CLUSTER": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
        }

    def start(self):
        """Start what does not run: the head with all nodes, or the nodes that are missing."""
        _protect_token()  # makes it, where no study on this machine has
        if self.head is None or self.head.poll() is not None:
            self.stop()
            self._scratch.mkdir(exist_ok=True)
            dashboard = ["--include-dashboard", str(self._has_jobs).lower()]
            dashboard += ["--dashboard-host", "127.0.0.1", "--dashboard-port", str(self._dashboard_port)]
            arguments, variables = self._autoscaler() if self._max_workers else ([], {})
            arguments = ["--head", "--port", str(self.port), "--num-cpus", "0", *dashboard, *arguments]
            self.head = self._node(*arguments, variables=variables)
        self.nodes = [node for node in self.nodes if node.poll() is None]
        if num_missing := max(0, self._num_nodes - len(self.nodes)):
            with ThreadPoolExecutor(num_missing) as pool:
                arguments = ("--address", self.address, "--num-cpus", "1")
                started = [pool.submit(self._node, *arguments) for _ in range(num_missing)]
                self.nodes += [one.result() for one in started]

    def add_node(self, *arguments, mounts=()):
        """Start one more node. mounts: pairs of folders; for the node the first is in the place of the second."""
        self.nodes.append(self._node("--address", self.address, "--num-cpus", "1", *arguments, mounts=mounts))

    def sessions(self):
        return {node.pid for node in (self.head, *self.nodes) if node is not None}

    @staticmethod
    def signal_node(node, number):
        """Send a signal to all processes of a node at once."""
        for pid in [pid for pid, (_, session, _) in processes().items() if session == node.pid]:
            kill(pid, number)

    @classmethod
    def kill_node(cls, node):
        """Kill all processes of a node at once, as the loss of its machine does."""
        cls.signal_node(node, signal.SIGKILL)
        node.wait(30)

    def stop(self):
        for node in filter(None, (self.head, *self.nodes)):
            self.kill_node(node)
        self.head, self.nodes = None, []
        shutil.rmtree(self._scratch, ignore_errors=True)
