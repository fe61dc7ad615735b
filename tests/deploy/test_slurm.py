"""deploy/slurm.sh with stand-ins for Slurm's commands: its signals, its exit code, and the study that it starts."""

import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
import typer

from raydml.cli.main import app

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "deploy" / "slurm.sh"
#: What stands for srun runs the command behind `--`; for python, a study that ends in order, or with a code of its own.
STAND_INS = {
    "srun": 'echo "$@" > "$SLURM_SUBMIT_DIR/srun"; while [[ $1 != -- ]]; do shift; done; shift; "$@"',
    "scontrol": 'if [[ $1 == show ]]; then printf "%s\\n" node{1,2}; else echo "$@" > "$SLURM_SUBMIT_DIR/requeued"; fi',
    "python": 'echo "$@" > "$SLURM_SUBMIT_DIR/study"; trap "exit 143" TERM; touch "$SLURM_SUBMIT_DIR/runs"; '
    'for _ in $(seq "${STUDY_LOOPS:-200}"); do sleep 0.05; done; exit "${STUDY_CODE:-0}"',
}


@pytest.fixture
def job(tmp_path: Path) -> dict[str, str]:
    """The environment of a job in a folder with an environment and a token."""
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, body in STAND_INS.items():
        (programs / name).write_text(f"#!/bin/bash\n{body}\n")
        (programs / name).chmod(0o755)
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("token")
    variables = {"SUBMIT_DIR": str(tmp_path), "JOB_ID": "7", "JOB_NODELIST": "node[1-2]", "JOB_NUM_NODES": "2"}
    slurm = {f"SLURM_{name}": value for name, value in {**variables, "CPUS_PER_TASK": "32"}.items()}
    return {**os.environ, **slurm, "HOME": str(tmp_path)}


def start(job: dict[str, str]) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(["bash", SCRIPT], env=job, start_new_session=True)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.02)


@pytest.mark.parametrize("code", [0, 2])
def test_the_exit_code_is_that_of_the_study(job: dict[str, str], tmp_path: Path, code: int) -> None:
    process = start({**job, "STUDY_LOOPS": "1", "STUDY_CODE": str(code)})
    assert process.wait(30) == code
    assert not (tmp_path / "requeued").exists(), "the mistake would be made again and again"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_the_study_in_order_and_the_end_of_the_time_queues_it_again(
    job: dict[str, str], tmp_path: Path, number: signal.Signals
) -> None:
    process = start(job)
    wait_for(tmp_path / "runs")
    os.kill(process.pid, number)  # of the script alone, as Slurm does for the batch shell
    assert process.wait(30) == 143
    assert (tmp_path / "requeued").exists() == (number == signal.SIGUSR1)
    if number == signal.SIGUSR1:
        assert (tmp_path / "requeued").read_text() == "requeue 7\n"


def test_a_study_that_ends_while_the_time_does_is_not_queued_again(job: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / ".venv" / "bin" / "python").write_text(
        '#!/bin/bash\ntrap "exit 0" TERM; touch "$SLURM_SUBMIT_DIR/runs"; for _ in {1..200}; do sleep 0.05; done\n'
    )
    process = start(job)
    wait_for(tmp_path / "runs")
    os.kill(process.pid, signal.SIGUSR1)
    assert process.wait(30) == 0
    assert not (tmp_path / "requeued").exists()


def test_a_missing_token_is_named_with_its_cure(job: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / ".ray" / "auth_token").unlink()
    done = subprocess.run(["bash", SCRIPT], env=job, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2
    assert "Cure: (umask 077; ray get-auth-token" in done.stderr
    assert not (tmp_path / "srun").exists()


def test_ray_starts_with_the_token_and_the_study_is_a_command_of_the_program(
    job: dict[str, str], tmp_path: Path
) -> None:
    assert start({**job, "STUDY_LOOPS": "1"}).wait(30) == 0
    ray = (tmp_path / "srun").read_text()
    options = "ray symmetric-run --address node1:6379 --min-nodes 2 --num-cpus=32 --dashboard-host=127.0.0.1"
    assert options in ray
    script, command, *words = shlex.split((tmp_path / "study").read_text())
    assert (script, command) == ("launch.py", "sweep")
    assert (ROOT / words[0]).is_file()
    typed = typer.main.get_command(app).commands["sweep"].make_context("sweep", words).params  # type: ignore[attr-defined]
    assert typed["address"] == "node1:6379"
    text = SCRIPT.read_text(encoding="utf-8")
    assert 'export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$HOME/.ray/auth_token"' in text
    assert re.search(r"^#SBATCH --exclusive$", text, flags=re.MULTILINE), "ray stop would end another job's Ray"
    assert re.search(r"^#SBATCH --signal=B:USR1@\d{3}$", text, flags=re.MULTILINE)
