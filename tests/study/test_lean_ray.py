"""In a process of its own: Ray is started once in a process, and that of the tests may have started another one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ray._private.node import Node

from raydml.study.lean_ray import LEFT_OUT, few_processes, shared_workers, uncounted_callbacks

ROOT = Path(__file__).parents[2]
PROGRAM = """
import json, os, sys
from raydml.cli.main import prepare_environment
prepare_environment()
from raydml.study.cluster import connected
from raydml.study.lean_ray import uncounted_callbacks
from tests.chaos.targets import processes

def words_of_session():
    return [words for _, session, words in processes().values() if session == os.getpid()]

with connected(None, os.environ):
    import ray
    from ray import tune

    class Trial(tune.Trainable):
        def step(self):
            return {"done": True, "environment": dict(ray.get_runtime_context().runtime_env)}
        def save_checkpoint(self, folder):
            pass

    run = tune.RunConfig(name="run", storage_path=sys.argv[1], verbose=0, callbacks=[tune.Callback()])
    with uncounted_callbacks():
        (result,) = tune.Tuner(Trial, run_config=run).fit()
    print(json.dumps([result.metrics["environment"], "mlflow" in sys.modules, words_of_session()]))
"""


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.xdist_group("cluster")
def test_an_embedded_ray_runs_a_trial_without_what_it_does_not_need(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], cwd=ROOT, env={**os.environ, "HOME": str(tmp_path)},
        capture_output=True, text=True, timeout=120, start_new_session=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    environment, has_mlflow, processes = json.loads(done.stdout.splitlines()[-1])
    assert environment == {}, "a trial with an environment of its own has a process of its own"
    assert not has_mlflow, "Tune has counted the callbacks"
    started = " ".join(processes)
    assert "gcs_server" in started
    assert "raylet" in started
    for left_out in ("monitor.py", "log_monitor.py", "dashboard.py"):
        assert left_out not in started


def test_ray_and_tune_are_as_before_afterwards(monkeypatch):
    from ray.air._internal import usage
    from ray.tune.execution import class_cache

    def now():
        of_tune = (class_cache.DEFAULT_ENV_VARS, class_cache.ENV_VARS_TO_PROPAGATE, usage.tag_callbacks)
        return [*(getattr(Node, name) for name in LEFT_OUT), *of_tune]

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    before = now()
    with few_processes(), shared_workers(), uncounted_callbacks():
        assert all(one is not other for one, other in zip(before, now(), strict=True))
    assert all(one is other for one, other in zip(before, now(), strict=True))


def test_callbacks_are_counted_for_who_sends_statistics(monkeypatch):
    from ray.air._internal import usage

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
    before = usage.tag_callbacks
    with uncounted_callbacks():
        assert usage.tag_callbacks is before
