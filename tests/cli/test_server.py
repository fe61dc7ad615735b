"""The server behind ui ends with every signal, with all of its processes."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from raydml.cli import server
from raydml.tracking.store import prepare_store

# Answers every request with 200; its child holds a port, too, and ignores TERM.
FAKE = """
import http.server, signal, socket, subprocess, sys, time
port, child_port = int(sys.argv[1]), sys.argv[2]
CHILD = '''
import signal, socket, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
with socket.socket() as held:
    held.bind(("127.0.0.1", int(sys.argv[1])))
    held.listen()
    print("ready", flush=True)
    time.sleep(60)
'''
child = subprocess.Popen([sys.executable, "-S", "-c", CHILD, child_port], stdout=subprocess.PIPE)
child.stdout.readline()
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *_): pass
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def two_free_ports():
    with socket.socket() as first, socket.socket() as second:
        for one in (first, second):
            one.bind(("127.0.0.1", 0))
        return first.getsockname()[1], second.getsockname()[1]


def becomes_free(port):
    for _ in range(50):
        if server.is_free(port):
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize(("number", "code"), [("SIGINT", 0), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_ends_the_server_and_its_children(number, code, monkeypatch):
    port, child_port = two_free_ports()
    monkeypatch.setattr(
        server, "_command", lambda _uri, port: [sys.executable, "-S", "-c", FAKE, str(port), str(child_port)]
    )
    free = []

    def signal_myself():
        free.extend([server.is_free(port), server.is_free(child_port)])
        os.kill(os.getpid(), getattr(signal, number))

    before = signal.getsignal(signal.SIGTERM)
    assert server.serve_ui("sqlite:///none", port, signal_myself) == code
    assert free == [False, False]
    assert becomes_free(port)
    assert becomes_free(child_port)
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_server_that_does_not_start_ends_the_command_with_its_code(monkeypatch):
    monkeypatch.setattr(server, "_command", lambda *_: [sys.executable, "-S", "-c", "raise SystemExit(7)"])
    answers = []
    assert server.serve_ui("sqlite:///none", two_free_ports()[0], lambda: answers.append(1)) == 7
    assert answers == []


@pytest.mark.slow
def test_ui_prints_its_address_when_it_answers_and_leaves_no_process(tmp_path):
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    prepare_store(uri, tmp_path)
    port, _ = two_free_ports()
    command = [sys.executable, "launch.py", "ui", "--storage", str(tmp_path), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    assert f"http://127.0.0.1:{port}/#/experiments/" in line
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as page:
        assert page.status == 200
    process.send_signal(signal.SIGTERM)
    begin_s = time.monotonic()
    _, stderr = process.communicate(timeout=60)
    assert time.monotonic() - begin_s < 30
    assert process.returncode == 143
    assert becomes_free(port)
    assert "DeprecationWarning" not in stderr
