"""The MLflow server behind the command ui: started, waited for, and ended together with the command."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable

import requests

from raydml.study.process import stop_signals

FIRST_PORT = 5000
POLL_S = 0.2
END_S = 10.0  # longest wait for the server to close its connections


def serve_ui(uri: str, port: int, on_answer: Callable[[], None]) -> int:
    """Run an MLflow server for a store on 127.0.0.1 until it ends or one of STOP_SIGNALS arrives; return the exit code.

    on_answer: called once, when the server answers. The server has a process group of its own, so that a signal ends
    all of its workers. The exit code is 0 after Ctrl-C, the usual end, 128 + number after another signal, and otherwise
    the server's own.
    """
    with stop_signals() as received:
        server = subprocess.Popen(_command(uri, port), start_new_session=True)
        try:
            answered = False
            while server.poll() is None and not received:
                if not answered and _answers(port):
                    answered = True
                    on_answer()
                time.sleep(POLL_S)
        finally:
            _end(server)
    if not received:
        return server.returncode
    return 0 if received[0] == signal.SIGINT else 128 + received[0]


def is_free(port: int) -> bool:
    """Return whether a server can listen on the port of 127.0.0.1."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def free_port() -> int:
    """Return the first free port from FIRST_PORT."""
    return next(port for port in range(FIRST_PORT, FIRST_PORT + 1000) if is_free(port))


def _command(uri: str, port: int) -> list[str]:
    # One worker serves one person, and starts four times faster than MLflow's four. Only warnings are logged.
    stores = ["--backend-store-uri", uri, "--registry-store-uri", uri]
    options = ["--workers", "1", "--uvicorn-opts", "--log-level warning"]
    return [sys.executable, "-m", "mlflow", "server", *stores, *options, "--host", "127.0.0.1", "--port", str(port)]


def _answers(port: int) -> bool:
    try:
        return requests.get(f"http://127.0.0.1:{port}/health", timeout=1).ok
    except requests.RequestException:
        return False


def _end(server: subprocess.Popen[bytes]) -> None:
    """End the server and every process of its group."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, number)
            server.wait(END_S)
        except ProcessLookupError:  # all processes of the group have ended
            break
        except subprocess.TimeoutExpired:
            continue
    server.wait()
