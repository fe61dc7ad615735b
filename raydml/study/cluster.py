"""The Ray session of a study: its start-up, what each trial holds of it, and the signals that end it.

INT, TERM and HUP stop the running trials in order; a second signal stops them at once.
"""

from __future__ import annotations

import logging
import math
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import ray
from ray._private import services
from ray._raylet import GcsClient  # type: ignore[attr-defined]

from raydml.config.trial import Machine
from raydml.study.folder import StudyError
from raydml.study.lean_ray import few_processes, shared_workers
from raydml.study.node import note_of_room
from raydml.study.package import staged_package
from raydml.study.process import STOP_SIGNALS, RayEnded, stop_signals

_logger = logging.getLogger(__name__)
#: What Ray puts behind TMPDIR in the path of its longest socket.
_SOCKET_BYTES = len("/ray/session_2026-01-31_23-59-59_999999_4194304/sockets/plasma_store")
#: Nobody restarts the head of an embedded Ray. Its driver ends after so many seconds without it, and a new one begins.
_EMBEDDED = {"gcs_rpc_server_reconnect_timeout_s": 5}
_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # which Ray sets for the jobs of a cluster
_ANSWER_S = 5.0  # for the head of a cluster that is joined
#: In Ray's words where they are not equal: of the cluster, then of this process.
_VERSIONS = re.compile(r"^ +Ray: (\S+)\n +Python: (\S+)$", re.MULTILINE)
_SAME_SIGNAL_S = 2.0
_CHECK_EVERY_S, _LOST_AFTER_S = 1.0, 8.0  # for an embedded Ray that has lost a process


def _record_commands_as_utf8() -> None:
    """Let Ray record the command line of this process although an argument is not UTF-8; it would raise for one."""
    from ray._private import utils

    command = utils.get_entrypoint_name().encode("utf-8", "backslashreplace").decode()
    utils.get_entrypoint_name = lambda: command


def _protect_token() -> None:
    """Make the token of Ray's clusters readable by this user alone: whoever has it can run code in a study.

    Ray itself would write it into a folder and a file that everybody may read, and it listens on all interfaces.
    """
    from ray._private.authentication.authentication_token_generator import generate_new_authentication_token

    try:
        token = Path.home() / ".ray" / "auth_token"
    except RuntimeError:  # no home: Ray reports it
        return
    try:
        token.parent.mkdir(mode=0o700, exist_ok=True)
        token.parent.chmod(0o700)
        with suppress(FileExistsError), open(os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(generate_new_authentication_token())
        token.chmod(0o600)  # of a Ray that was started without raydml
    except FileNotFoundError:  # no home: Ray reports it
        return
    except OSError as error:
        _logger.warning("other users may be able to read Ray's token in %s: %s", token.parent, error)


def _hand_on_token(environment: MutableMapping[str, str]) -> None:
    """Put the token of Ray into the environment of this process, and so of all that its embedded Ray starts.

    They would read the file, each when it starts. Where that has been deleted meanwhile, they wait without a word.
    """
    if environment.get("RAY_AUTH_TOKEN") or environment.get("RAY_AUTH_TOKEN_PATH"):
        return
    with suppress(OSError, RuntimeError):  # no home: Ray reports it
        environment["RAY_AUTH_TOKEN"] = (Path.home() / ".ray" / "auth_token").read_text(encoding="utf-8").strip()


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _temp_dir() -> str | None:
    """Return the folder for an embedded Ray's sockets and logs; None for Ray's own choice, below TMPDIR.

    The path of a socket has at most 107 bytes (103 on macOS), of which Ray's names take 68. A longer TMPDIR, as some
    clusters give each job, is replaced by /tmp. Raises StudyError for a folder that cannot be written.
    """
    from ray._common.utils import get_default_system_temp_dir

    chosen = get_default_system_temp_dir()  # RAY_TMPDIR, else TMPDIR, else /tmp
    try:
        is_short = len(chosen.encode()) + _SOCKET_BYTES <= (103 if sys.platform == "darwin" else 107)
    except UnicodeEncodeError:  # a name that is not UTF-8, which Ray cannot write
        is_short = False
    used = chosen if is_short else "/tmp"
    if not is_short:
        _logger.warning(
            "note: TMPDIR = %s is too long for the sockets of Ray, or not UTF-8; Ray's files go to /tmp/ray",
            chosen.encode("utf-8", "backslashreplace").decode(),
        )
    try:
        os.makedirs(used, exist_ok=True)  # as Ray does
        with tempfile.TemporaryFile(dir=used):
            pass
    except OSError as error:
        raise StudyError(
            f"TMPDIR = {chosen}: Ray keeps its sockets and logs in {used}, which cannot be written "
            f"({error.strerror}). Cure: set RAY_TMPDIR to a folder on a local disk whose path has at most "
            f"{107 - _SOCKET_BYTES} bytes"
        ) from error
    return None if is_short else "/tmp/ray"


def _end_without_ray(over: threading.Event) -> None:
    """End this process where a process of its embedded Ray has ended for longer than Ray itself takes to notice.

    Ray waits for ever for the workers of a node whose raylet is gone.
    """
    num_seen = 0
    while not over.wait(_CHECK_EVERY_S):
        node = ray._private.worker._global_node
        dead = {str(kind) for kind, _ in node.dead_processes()} & {"raylet", "gcs_server"} if node else set()
        num_seen = num_seen + 1 if dead else 0
        if num_seen > _LOST_AFTER_S / _CHECK_EVERY_S:
            print(f"Ray's {' and '.join(sorted(dead))} ended", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)


def _refuse_unreachable(address: str) -> None:
    """Raise OSError or AuthenticationError within seconds, where Ray would try for minutes to join a cluster."""
    if "://" in address:  # of Ray's client, which answers for itself
        return
    try:
        found = services.canonicalize_bootstrap_address_or_die(address)
    except ValueError as error:
        raise ConnectionError(f"it is not HOST:PORT: {_first_line(error)}") from error
    host, _, port = found.rpartition(":")
    deadline_s = time.monotonic() + _ANSWER_S
    while True:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_S):
                break
        except ConnectionRefusedError as error:  # a head that starts
            if time.monotonic() > deadline_s:
                raise ConnectionError(f"nothing answers at {found}") from error  # Ray has resolved localhost
            time.sleep(0.2)
    answers: list[Exception | None] = []

    def ask() -> None:
        try:
            GcsClient(address=found).get_all_node_info(timeout=_ANSWER_S)
            answers.append(None)
        except Exception as error:  # raised below, if it comes in time
            answers.append(error)

    # GcsClient has a patience of its own, 40 s, with what is no head of Ray.
    asking = threading.Thread(target=ask, name="ray-probe", daemon=True)
    asking.start()
    asking.join(_ANSWER_S)
    if not answers:
        raise ConnectionError(f"what listens there does not answer as a head of Ray does, within {_ANSWER_S:g} s")
    if isinstance(answers[0], ray.exceptions.RpcError):
        raise ConnectionError(_first_line(answers[0])) from answers[0]
    if answers[0] is not None:
        raise answers[0]


def address_of_job(own_environment: Mapping[str, str] | None) -> str | None:
    """Return the address of the cluster that this process is a job of; None where it is none.

    own_environment: of this process, or None where it does not run a study alone.
    """
    return "auto" if own_environment and _JOB in own_environment else None


@contextmanager
def connected(address: str | None, own_environment: MutableMapping[str, str] | None = None) -> Iterator[None]:
    """Connect to the Ray cluster at an address, or start an embedded one that ends with the context. A Ray that this
    process has initialized already is used as it is. Raises StudyError if no cluster can be joined at the address.

    own_environment: of a process that does nothing else than to run a study. Such a process hands Ray's token on to
    its embedded Ray, and is ended where that has died.
    """
    if ray.is_initialized():
        yield
        return
    if own_environment is not None and address_of_job(own_environment):
        # The workers get the driver's copy of the package, in the place of the working directory of the job.
        own_environment["RAY_OVERRIDE_JOB_RUNTIME_ENV"] = "1"
    if not address:
        # Ray would print above the table of trials that its token authentication is on, as it should be.
        logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
        _protect_token()
        if own_environment is not None:
            _hand_on_token(own_environment)
    temp_dir = None if address else _temp_dir()
    # Tune's advice is wrong here, such as to go on with Tuner.restore. Its errors are the tracebacks of trials: the
    # events have their last lines, and the file error.txt of a trial has the whole.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    # Ray's handlers of TERM, which it installs in Python and below it, would end the process at once.
    is_main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS if is_main}
    _record_commands_as_utf8()
    try:
        if address:
            _refuse_unreachable(address)
        # On a cluster the workers get the driver's copy of the package, as their working directory: else Ray would look
        # first into the driver's folders, where a node may have a copy of its own.
        with staged_package() if address else nullcontext() as staged, nullcontext() if address else few_processes():
            ray.init(
                address=address or "local",  # without "local" Ray would join any cluster that it finds
                runtime_env={"working_dir": str(staged)} if staged else {},
                log_to_driver=False,
                logging_level="error",
                configure_logging=False,
                _temp_dir=temp_dir,
                **({} if address else {"include_dashboard": False, "_system_config": dict(_EMBEDDED)}),
            )
    except Exception as error:  # ray.init raises plain exceptions, where a process of Ray does not start in time, say
        if versions := _VERSIONS.findall(str(error)):
            there, here = (f"Ray {ray_version} on Python {python}" for ray_version, python in versions[:2])
            raise StudyError(
                f"--address {address}: the cluster has {there}, and this command {here}: Ray joins only what is equal. "
                "Cure: install requirements.lock with the same Python on all machines, and start the cluster from there"
            ) from error
        if not isinstance(error, (OSError, ray.exceptions.AuthenticationError)) or not address:
            raise RayEnded(f"Ray does not start: {_first_line(error)}") from error
        raise StudyError(
            f"--address {address}: no Ray cluster can be joined there ({_first_line(error)}). Cure: "
            "check with `ray status` that the cluster runs, and its address; a cluster with tokens needs "
            "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH"
        ) from error
    for number, handler in handlers.items():
        signal.signal(number, handler)
    over = threading.Event()
    if own_environment is not None and not address:
        threading.Thread(target=_end_without_ray, args=(over,), name="ray-watch", daemon=True).start()
    try:
        with nullcontext() if address else shared_workers():
            yield
    finally:
        over.set()
        ray.shutdown()


class EarlyRay:
    """An embedded Ray that starts before it is known which study needs it: the one of a process that waits for that.

    own_environment: see `connected`.
    """

    def __init__(self, own_environment: MutableMapping[str, str]) -> None:
        self._own_environment, self._stack = own_environment, ExitStack()
        self._error: StudyError | RayEnded | None = None

    def start(self) -> None:
        """Start it. What goes wrong is raised where it is used."""
        try:
            self._stack.enter_context(connected(None, self._own_environment))
        except (StudyError, RayEnded) as error:
            self._error = error

    @contextmanager
    def used(self) -> Iterator[None]:
        """Use it, and end it with the context. Raises StudyError or RayEnded where it did not start."""
        with self._stack:
            if self._error is not None:
                raise self._error
            yield


def trial_resources(machine: Machine, note: Callable[[str], None], *, joined: bool) -> dict[str, float]:
    """Return the CPUs and GPUs that each trial holds: ``auto`` is a whole GPU, or one a rank, if there are any.

    note: records a sentence for the user. joined: whether the cluster is one of several machines, where nodes may start
    on demand; there a number that no node has yet is waited for. Raises StudyError for what this machine lacks.
    """
    cluster = ray.cluster_resources()
    num_gpus, num_cpus = cluster.get("GPU", 0), cluster.get("CPU", 0)
    if machine.cpus_per_trial > num_cpus and not joined:
        raise StudyError(
            f"machine.cpus_per_trial = {machine.cpus_per_trial}, but this machine has {num_cpus:g} CPUs, and the "
            f"trials would wait forever. Cure: --set machine.cpus_per_trial={max(1, int(num_cpus))}"
        )
    gpus = machine.num_gpus(are_there=num_gpus > 0)
    if gpus > num_gpus and not joined:
        setting, cure = f"gpus_per_trial = {gpus:g}", "machine.gpus_per_trial=0"
        if machine.gpus_per_trial == "auto":
            is_one = machine.ranks_per_trial == "auto"
            setting = "device = cuda" if is_one else f"ranks_per_trial = {gpus:g}"
            cure = "machine.device=auto" if is_one else cure
        raise StudyError(
            f"machine.{setting}, but this machine has {num_gpus:g} GPUs, and the trials would wait for ever. Cure: "
            f"--set {cure}, or --address of a cluster with GPUs"
        )
    if machine.gpus_per_trial == "auto":
        if not num_gpus:
            if not gpus:
                cure = " (GPU nodes that start on demand: --set machine.device=cuda)" if joined else ""
                note(f"No GPU found; training on the CPU{cure}.")
        elif not gpus:
            note("machine.device is cpu: the GPUs of this cluster are not used.")
    elif not gpus and num_gpus:
        note("machine.gpus_per_trial is 0: the GPUs of this cluster are not used.")
    held = {"cpu": float(machine.cpus_per_trial), "gpu": gpus}
    if joined and (missing := note_of_room(held, machine.node_labels)):
        note(missing)
    return held


class Interrupted(Exception):
    """A signal arrived, and Tune has stopped its actors. number: which signal."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def catch_signals() -> Iterator[list[int]]:
    """Collect the signals that stop a study; a later second one raises KeyboardInterrupt.

    Who ends a group of processes, as Ray does with those of a job, sends one to this process and one to the process
    that has started it, which passes it on: two at about the same time are one.

    Tune ends its loop in order on USR1, so each signal that arrives is passed on to Tune as USR1.
    """
    over = threading.Event()

    def ignore(_number: int, _frame: Any) -> None:
        """Do nothing: between two Tune runs USR1 has no handler, and its default action would kill the driver."""

    def pass_on() -> None:
        # A Tune run that is just starting has not installed its handler yet: send USR1 once to each new handler.
        signalled: Any = ignore
        while not over.wait(0.1):
            handler = signal.getsignal(signal.SIGUSR1)
            if handler is not signalled:
                signalled = handler
                os.kill(os.getpid(), signal.SIGUSR1)

    first_s = math.inf

    def on_signal(_number: int) -> None:
        nonlocal first_s
        if len(received) > 1:
            if time.monotonic() - first_s > _SAME_SIGNAL_S:
                raise KeyboardInterrupt
            return
        first_s = time.monotonic()
        threading.Thread(target=pass_on, name="interrupt", daemon=True).start()

    with stop_signals(on_signal) as received:
        before = signal.signal(signal.SIGUSR1, ignore)
        try:
            yield received
        finally:
            over.set()
            signal.signal(signal.SIGUSR1, before)
