"""One command from a folder of photos to a finished study: few classes, few images, nothing edited."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tests.cli.commands import done, refused, run
from tests.study.small import ONE_PROCESS

ROOT = Path(__file__).parents[2]
SPLIT = "6 classes in class folders, 12 images: 2 train / 2 validate / 2 test, sealed"


@pytest.fixture
def photos(tmp_path):
    """6 classes of 2 images; a class has a colour."""
    generator = np.random.default_rng(0)
    for label in range(6):
        (tmp_path / "photos" / f"class {label}").mkdir(parents=True)
        for number in range(2):
            colour = generator.integers(0, 40, (80, 70, 3)) + np.array([40 * label, 255 - 40 * label, 90])
            Image.fromarray(colour.clip(0, 255).astype(np.uint8)).save(
                tmp_path / "photos" / f"class {label}" / f"{number}.jpg"
            )
    return tmp_path / "photos"


def test_a_trial_of_a_folder_is_trial_0_of_its_study(photos, tmp_path):
    result = done("trial", photos, "--max-epochs", "1", "--storage", tmp_path, "--set", "trial.epochs=5")
    assert SPLIT in result.stderr
    assert "sampler.classes_per_batch 16 -> 2" in result.stderr
    assert result.stdout.splitlines()[-1].split()[0] == "1"


def test_names_that_control_a_terminal_are_shown_in_letters(photos, tmp_path):
    (photos / "class 0").rename(photos / "\x1b[31mred\x9b")
    (photos / "\x1b[31mred\x9b" / "0.jpg").write_bytes(b"no image")
    result = run("trial", photos, "--storage", tmp_path, "--set", "trial.data.split.order=sorted")
    assert result.exit_code == 2
    assert "\\x1b[31mred\\x9b/0.jpg: no JPEG" in result.stderr
    assert not set(result.stderr) & {"\x1b", "\x9b"}


def test_a_disk_without_room_for_the_model_is_found_before_the_training(photos, tmp_path, monkeypatch):
    free = SimpleNamespace(free=3_000_000)
    monkeypatch.setattr("raydml.ops.files.shutil.disk_usage", lambda _: free)
    monkeypatch.setattr("raydml.training.trainer.Trainer.epochs", lambda _: pytest.fail("it trains"))
    text = refused("trial", photos, "--save", tmp_path / "model", "--storage", tmp_path)
    assert re.search(
        r"--save .*model: No space left on device: a checkpoint needs \d+\.\d MB, and 3\.0 MB are free", text
    )
    assert "Cure: free disk space, or a folder on another disk" in text
    assert not (tmp_path / "model").exists()


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.xdist_group("ray")
def test_a_folder_of_six_classes_becomes_a_finished_study(photos, tmp_path):
    command = [sys.executable, "-m", "raydml", "sweep", photos, "--num-trials", "2", "--max-epochs", "1"]
    command += ["--set", "study.confirm.seeds=1", "--set", "study.confirm.top=1", *ONE_PROCESS]
    run = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert SPLIT in run.stderr
    study = tmp_path / "studies" / "photos"
    trials = json.loads((study / "study.json").read_text())["trials"]
    assert {trial["data"]["split"]["num_folds"] for trial in trials} == {2}
    (tested,) = json.loads((study / "final.json").read_text())
    assert 0 <= tested["metrics"]["recall_at_1"]["mean"] <= 1
    assert (study / "report" / "report.html").is_file()
