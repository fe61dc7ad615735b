"""The commands: exit codes, messages, the calls of the modules below, and the numbers that come back."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import filelock
import pytest
from PIL import Image
from rich.console import Console

from raydml import registry
from raydml.cli import arguments, live_view, main, server, studies, tables
from raydml.cli.arguments import seconds_of, study_argument
from raydml.study import events
from raydml.study.budget import Budget
from raydml.study.driver import LOCK
from raydml.study.events import reduce_events
from raydml.study.folder import read_study, write_json
from raydml.study.summary import summarise
from raydml.tracking import store as mlflow_store
from tests.cli.commands import done, refused, run
from tests.report.written_study import footprint, write_published_study
from tests.study.study_events import epoch, stage_started, started, study_started

ROOT = Path(__file__).parents[2]
COMMANDS = [
    *(
        "sweep",
        "submit",
        "doctor",
        "init",
        "resume",
        "status",
        "report",
        "ui",
        "sync",
        "trial",
        "evaluate",
        "export",
        "import",
        "index",
        "query",
        "list",
    ),
    "schema",
]
TRIAL = {
    "epochs": 2,
    "data": {"name": "digits", "resize_px": 8, "crop_px": 8, "split": {"order": "sorted", "num_folds": 2}},
    "model": {"backbone": "convnet", "weights": "none", "embedding_dim": 16},
    "loss": {"name": "normalized_softmax"},
    "sampler": {"name": "uniform", "batch_size": 128},
    "optimizer": {"name": "adamw", "learning_rate": 1e-3},
}


@pytest.fixture(autouse=True)
def _apart(own_folder, monkeypatch):  # noqa: ARG001 - changes the environment before it is copied
    """Each test in a folder of its own, with the environment as it was afterwards."""
    monkeypatch.setattr(os, "environ", os.environ.copy())


def launch(*arguments, **more):
    command = [sys.executable, str(ROOT / "launch.py"), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, check=False, **more)


def make_study(storage, name="digits", **more):
    """A study's folder as far as these commands look at it."""
    folder = storage / name
    folder.mkdir(parents=True)
    study = {"name": name, "study_id": "0" * 32, "tracking_uri": "http://127.0.0.1:9", "machine": {}, "trials": []}
    study |= {"storage": str(storage), "study": {"name": name, "select_on": "val_map_at_r"}, **more}
    (folder / "study.json").write_text(json.dumps(study))
    return folder


def write_trial(path, **more):
    path.write_text(json.dumps({**TRIAL, **more}))
    return str(path)


def test_help_names_every_command_and_is_what_no_command_shows():
    text = run("--help").output
    for command in COMMANDS:
        assert f" {command} " in text
    shown = {command.name for command in main.app.registered_commands if not command.hidden}
    assert shown == set(COMMANDS)
    assert [group.name for group in main.app.registered_groups] == ["data"]
    assert " data " in text
    assert run("--version").output.startswith("raydml ")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_and_every_option_has_a_help_text(command):
    done(command, "--help")
    click_command = main.typer.main.get_command(main.app).commands[command]
    assert len((click_command.help or "").splitlines()[0]) <= 72
    assert [option.name for option in click_command.params if not getattr(option, "help", None)] == []


def test_no_word_of_a_help_text_is_cut_at_80_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    group = main.typer.main.get_command(main.app)
    commands = {name: command for name, command in group.commands.items() if name != "data"}
    commands |= {f"data {name}": command for name, command in group.commands["data"].commands.items()}
    for name, command in commands.items():
        output = run(*name.split(), "--help").output
        assert re.findall(r"<[^>]*│", output) == [], f"{name}: a type is cut"
        shown = set(output.replace("│", " ").split())
        texts = [(command.help or ""), *(option.help or "" for option in command.params)]
        texts += [option.metavar or "" for option in command.params]
        assert {word for text in texts for word in text.split()} - shown == set(), name
        assert not any("…" in word for word in shown), name


# What each command may have imported when it ends, in this order; the exit code.
LIGHT_COMMANDS = [
    ("--help", 0, set()),
    ("status", 0, {"pydantic"}),
    ("query GALLERY nothing.png", 2, {"pydantic"}),
    ("sweep nothing.yaml", 2, {"pydantic"}),
    ("sweep wrong.yaml --num-trials x", 2, {"pydantic"}),
    ("status nothing", 2, {"numpy", "pydantic"}),
    ("status made", 0, {"numpy", "pydantic"}),
    ("sweep wrong.yaml", 2, {"numpy", "pydantic"}),
    ("trial wrong.json", 2, {"numpy", "pydantic"}),
    ("list", 0, {"numpy", "pydantic"}),
    ("list losses", 0, {"numpy", "pydantic"}),
    ("list backbones", 0, {"numpy", "pydantic"}),
    ("list spaces", 0, {"numpy", "pydantic"}),
    ("schema", 0, {"numpy", "pydantic"}),
    ("resume nothing", 2, {"numpy", "pydantic"}),
    ("export nothing new", 2, {"numpy", "pydantic"}),
    ("evaluate nothing", 2, {"numpy", "pydantic"}),
    ("evaluate backbone:convnet --data digits", 2, {"numpy", "pydantic"}),
    ("data check nothing", 2, {"numpy", "pydantic"}),
]
HEAVY = {"torch", "torchvision", "ray", "mlflow", "matplotlib", "pandas", "faiss", "scipy", "numpy", "pydantic"}


def test_light_commands_import_nothing_heavy(tmp_path):
    make_study(tmp_path / "studies", "made")
    (tmp_path / "wrong.yaml").write_text((ROOT / "search_spaces" / "digits.yaml").read_text() + "  optimiser: {}\n")
    (tmp_path / "wrong.json").write_text(json.dumps({**TRIAL, "optimiser": {}}))
    code = f"""
import json, sys
from typer.testing import CliRunner
from rich.console import Console

from raydml.cli import main
for command in json.loads(sys.argv[1]):
    result = CliRunner().invoke(main.app, command.split())
    names = {{name.partition(".")[0] for name in sys.modules}} & {HEAVY}
    print(json.dumps([result.exit_code, sorted(names), result.output[-300:]]))
"""
    commands = json.dumps([command for command, _, _ in LIGHT_COMMANDS])
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, commands],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        check=True,
    )
    for line, (command, code, allowed) in zip(done.stdout.splitlines(), LIGHT_COMMANDS, strict=True):
        exit_code, imported, output = json.loads(line)
        assert exit_code == code, f"{command}: {output}"
        assert set(imported) <= allowed, command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("sweep SPACE --max-epochs -1", "--max-epochs = '-1': must be >= 1"),
        ("sweep SPACE --num-trials 0", "--num-trials = '0': must be >= 1"),
        ("sweep SPACE --seed x", "--seed = 'x': must be a whole number"),
        (
            "sweep SPACE --scheduler asah",
            "--scheduler = 'asah': is not one of the choices\n    choices: asha, promotion, pasha, sync, none",
        ),
        ("sweep SPACE --name a/b", "--name = 'a/b': is not a usable name of a folder"),
        ("list nosuch", "KIND = 'nosuch' is not one of the kinds"),
        ("query GALLERY nothing.png", "no such image: nothing.png"),
        ("query GALLERY SPACE", "GALLERY = 'GALLERY': no such folder"),
        ("index digits nothing new", "FOLDER = 'nothing': no such folder"),
    ],
)
def test_a_wrong_option_is_named_as_it_was_written(arguments, message, tmp_path):
    (tmp_path / "SPACE").write_text("trial: {}\n")
    assert f"error: {message}" in refused(*arguments.split())
    for words in ("Value error", "Input should", "--set"):
        assert words not in refused(*arguments.split())


def test_environment_keeps_what_the_user_has_set(monkeypatch):
    monkeypatch.setenv("RAY_DEDUP_LOGS", "0")
    monkeypatch.setenv("TUNE_DISABLE_SIGINT_HANDLER", "0")
    monkeypatch.delenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", raising=False)
    monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY", raising=False)
    main.prepare_environment()
    assert (os.environ["MLFLOW_DISABLE_TELEMETRY"], os.environ["RAY_DEDUP_LOGS"]) == ("true", "0")
    assert os.environ["TUNE_DISABLE_SIGINT_HANDLER"] == "1", "with Tune's handler Ctrl-C would end with exit code 0"
    assert os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] == "0"


@pytest.mark.parametrize("is_imported", [False, True])
def test_rays_kind_of_authentication_is_set_before_ray_reads_it_or_not_at_all(tmp_path, monkeypatch, is_imported):
    """Ray reads it when it is imported. Its own processes would read it later, and refuse the one that started them."""
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("secret")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "")  # so that it is put back
    monkeypatch.delenv("RAY_AUTH_MODE")
    monkeypatch.setitem(sys.modules, "ray", object())
    if not is_imported:
        monkeypatch.delitem(sys.modules, "ray")
    main.prepare_environment()
    assert os.environ.get("RAY_AUTH_MODE") == (None if is_imported else "token")


@pytest.mark.parametrize(
    ("given", "means"),
    [
        ([], ["sweep", "SPACE"]),
        (["--num-trials", "4"], ["sweep", "SPACE", "--num-trials", "4"]),
        (["--help"], ["--help"]),
        (["--version"], ["--version"]),
        (["resume", "x"], ["resume", "x"]),
    ],
)
def test_without_a_command_it_is_the_default_study(given, means):
    space = ROOT / "search_spaces" / "digits.yaml"
    assert main.with_default_command(given, space) == [str(space) if word == "SPACE" else word for word in means]
    assert main.with_default_command(given, None) == given


def test_commands_that_are_printed_start_as_the_user_started(monkeypatch):
    monkeypatch.delenv("UV_RUN_RECURSION_DEPTH", raising=False)
    assert main.program_name("launch.py") == "python launch.py"
    assert main.program_name("/venv/bin/raydml") == "raydml"
    monkeypatch.setenv("UV_RUN_RECURSION_DEPTH", "1")
    assert main.program_name("launch.py") == "uv run launch.py"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sweep", "search_spaces/digit.yaml"], ["no such file", "did you mean 'digits'?", "Cure"]),
        (["sweep", "search_spaces/digits.yaml", "--stages", "confirm"], ["--stages", "must name search", "Cure"]),
        (["trial", "nothing.yaml"], ["CONFIG = 'nothing.yaml'", "Cure"]),
    ],
)
def test_a_users_mistake_is_reported_in_full_without_a_traceback(arguments, words):
    done = launch(*arguments, cwd=ROOT)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    for word in words:
        assert word in done.stderr


def test_a_mistake_of_ours_has_a_traceback_and_ctrl_c_is_130(monkeypatch):
    def fail(error):
        raise error

    monkeypatch.setattr(studies, "read_trial", lambda *_: fail(ValueError("a plain ValueError comes from a bug")))
    with pytest.raises(ValueError, match="comes from a bug"):
        run("trial", "x.yaml")
    monkeypatch.setattr(studies, "read_trial", lambda *_: fail(KeyboardInterrupt()))
    assert run("trial", "x.yaml").exit_code == 130


def fake_run(monkeypatch, outcome):
    """The study's modules without Ray and MLflow; gives the list of what was calls of them."""
    calls = []

    class Tracker:
        def __init__(self, *arguments):
            calls.append(("tracker", *arguments))

        def start(self):
            calls.append("start")

        def finish(self, _timeout_s):
            calls.append("finish")
            return False

        def hint(self, command):
            return f"deliver it later: {command}"

    def run_driver(folder, _command, _received, _show, *, address, budget, first):
        calls.append((folder, address, budget.time_s))
        calls.append(first)
        return outcome

    class Driver:
        def __init__(self, command):
            self.command = command

        def load(self):
            calls.append("load")

        def end_unused(self):
            calls.append("end_unused")

    monkeypatch.setattr("raydml.study.process.run_driver", run_driver)
    monkeypatch.setattr("raydml.study.process.DriverProcess", Driver)
    monkeypatch.setitem(sys.modules, "raydml.tracking.delivery", SimpleNamespace(Tracker=Tracker))
    monkeypatch.setattr("raydml.tracking.store.prepare_store", lambda *_: None)
    return calls


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_study_says_how_to_go_on(monkeypatch, tmp_path, number, code):
    folder = make_study(tmp_path / "else where", "digits")
    calls = fake_run(monkeypatch, SimpleNamespace(status="interrupted", signal=int(number)))
    result = run("resume", "digits", "--storage", "else where", "--address", "auto", "--time", "1h30m")
    assert result.exit_code == code
    assert "launch.py resume 'else where/digits' --address auto" in result.output
    assert "launch.py sync 'else where/digits'" in result.output, "what MLflow lacks must be said"
    assert "MLflow: http://127.0.0.1:9" in result.output, "the server's address"
    assert calls.index("start") < calls.index((folder, "auto", 5400.0)) < calls.index("finish")
    assert (calls[0], calls[-1]) == ("load", "end_unused"), "the driver imports its libraries from the beginning"
    (driver,) = [call for call in calls if type(call).__name__ == "Driver"]  # and is the one that runs the study
    assert driver.command[-1] == "drive", "no Ray of its own, beside the cluster that is joined"


def test_a_driver_that_joins_no_cluster_starts_ray_at_once(monkeypatch, tmp_path):
    make_study(tmp_path / "studies", "digits")
    calls = fake_run(monkeypatch, SimpleNamespace(status="interrupted", signal=2))
    assert run("resume", "digits").exit_code == 130
    (driver,) = [call for call in calls if type(call).__name__ == "Driver"]
    assert driver.command[-2:] == ["drive", "--embedded"]


def test_a_time_limit_is_a_duration_with_units(tmp_path):
    values = {"90s": 90, "15m": 900, "2h": 7200, "1h30m": 5400, "1h0m5s": 3605}
    assert {text: seconds_of(text) for text in values} == values
    make_study(tmp_path / "studies", "digits")
    for text in ("15", "m15", "0s", "-5m", "1.5h", "30m1h", "", "٣m"):
        assert f"--time = {text!r}: is not a duration. Cure: write 90s," in refused(
            "resume", "digits", f"--time={text}"
        )


def test_study_argument_is_what_the_next_command_understands(tmp_path, monkeypatch):
    make_study(tmp_path / "studies", "mine")
    elsewhere = make_study(tmp_path / "other", "mine")
    assert study_argument(tmp_path / "studies" / "mine") == "mine"
    assert study_argument(elsewhere) == "other/mine"
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    assert study_argument(elsewhere) == str(elsewhere)


@pytest.mark.parametrize(
    ("stages", "overrides"),
    [
        (None, []),
        ("search", ["study.confirm=null", "study.refit=null", "study.finalize=null"]),
        ("search,confirm", ["study.refit=null", "study.finalize=null"]),
        ("search, confirm, finalize", ["study.refit=null"]),
        ("search,refit", ["study.confirm=null", "study.finalize=null"]),
        ("search,confirm,refit,finalize", []),
    ],
)
def test_stages_that_are_not_named_are_taken_out(stages, overrides):
    assert studies.stage_overrides(stages) == overrides


@pytest.mark.parametrize("stages", ["", "confirm", "search,search", "search,confrim"])
def test_stages_that_make_no_study_are_refused(stages):
    with pytest.raises(ValueError, match="Cure"):
        studies.stage_overrides(stages)


SPACE = """\
study: {search: {num_trials: 1}}
trial:
  data: {name: digits, resize_px: 8, crop_px: 8}
  model: {backbone: convnet, weights: none}
  loss: {name: margin}
  sampler: {name: class_balanced}
"""


def test_options_reach_the_study(monkeypatch, tmp_path):
    (tmp_path / "space.yaml").write_text(SPACE.replace("convnet,", "convnet, embedding_dim: {randint: [8, 64]},"))
    seen = {}
    monkeypatch.setattr(studies, "run_and_show", lambda *_: None)
    fake_run(monkeypatch, None)

    def create_study(space, **arguments):
        seen.update(space=space, **arguments)

    monkeypatch.setattr("raydml.study.folder.create_study", create_study)
    done(
        *["sweep", "space.yaml", "--num-trials", "3", "--max-epochs", "7", "--seed", "5", "--name", "007"],
        *["--scheduler", "sync", "--data-root", "images", "--set", "trial.loss.beta=0.9", "--set", "study.seed=1"],
        *["--storage", "there"],
    )
    study = seen["space"].study
    assert (study.name, study.seed, study.search.num_trials, study.search.scheduler) == ("007", 5, 3, "sync")
    assert str(seen["space"].machine.data_root) == "images"
    assert seen["tracking_uri"] is None, "the embedded store is not recorded by its path: it moves with the storage"
    assert seen["space_text"] == (tmp_path / "space.yaml").read_text()
    from raydml.search_space.space import sample_trials

    trial = sample_trials(seen["space"])[0]
    assert (trial.epochs, trial.loss.settings["beta"]) == (7, 0.9)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.example")
    run("sweep", "space.yaml")
    assert seen["tracking_uri"] == "http://mlflow.example"


def test_a_wrong_space_names_every_mistake_and_starts_nothing(tmp_path):
    (tmp_path / "space.yaml").write_text(SPACE.replace("margin}", "margn}").replace("num_trials: 1", "num_trials: 0"))
    error = refused("sweep", "space.yaml", "--storage", "there")
    for words in ("space.yaml:5", "margn", "did you mean: margin", "space.yaml:1", "num_trials"):
        assert words in error
    assert not (tmp_path / "there").exists()


def test_a_stage_without_settings_is_refused(tmp_path):
    (tmp_path / "space.yaml").write_text(SPACE)
    assert "study.confirm" in refused("sweep", "space.yaml", "--stages", "search,confirm")
    assert "--set 'study.refit={top: 1}'" in refused("sweep", "space.yaml", "--stages", "search,refit")


def test_a_published_recipe_has_a_forecast_and_refuses_what_it_decides():
    space = ROOT / "search_spaces" / "multi_similarity_cub200.yaml"
    recipe = ("sweep", space, "--recipe", "published")
    text = " ".join(done(*recipe, "--seeds", "4", "--dry-run", "--as-published").output.split())
    # All 5,864 images of the 100 published training classes, 4 runs of 15 epochs of 200 batches.
    for words in ("multi_similarity_cub200-published: ", "refit 5,864 of 100 0 of 0 5,924 of 100", "nothing varies"):
        assert words in text
    assert "1 configuration x 4 seeds on all development classes = 4 runs of 15 epochs" in text
    assert "3,000 per trial of 15 epochs (240,000 images)" in text
    assert "4 runs scored on the test classes" in text
    assert "search" not in text.replace("search_spaces", "")
    options = [("--num-trials", "2"), ("--scheduler", "sync"), ("--stages", "search"), ("--set", "study.refit.seeds=2")]
    options += [("--set", "trial.data.split.val_fraction=0.5"), ("--set", "study.confirm=null")]
    for option in options:
        message = refused(*recipe, *option)
        assert f"{option[0]} " in message
        assert option[1] in message
        assert "nothing is searched or confirmed. Cure: leave out" in message
    assert "Cure: add --recipe published" in refused("sweep", space, "--seeds", "2")
    plain = ROOT / "search_spaces" / "digits.yaml"
    assert "names no published point" in refused("sweep", plain, "--recipe", "published", "--dry-run")


def test_dry_run_prints_a_forecast_and_makes_nothing(tmp_path):
    (tmp_path / "space.yaml").write_text(SPACE.replace("margin}", "margin, beta: {uniform: [0.5, 1.0]}}"))
    result = done("sweep", "space.yaml", "--num-trials", "3", "--dry-run", "--set", "trial.sampler.classes_per_batch=2")
    for words in ("nothing was started", "1,797 images of 10 classes", "loss.beta  uniform 0.5 to 1", "3 trials"):
        assert words in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["space.yaml"]


@pytest.mark.parametrize("width", [80, 120])
def test_a_forecast_needs_neither_images_nor_weights_and_fits_the_screen(monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    space = ROOT / "search_spaces" / "multi_similarity_cub200.yaml"
    lines = done("sweep", space, "--dry-run", "--as-published").output.splitlines()
    assert max(len(line) for line in lines) <= width
    text = " ".join(" ".join(lines).split())
    # The published split trains on 100 classes, of which a quarter validates here; steps and batch are in the space.
    for words in ("of 75", "of 25", "5,924 of 100", "200 per epoch with 80 images each (16,000 images)"):
        assert words in text
    assert "3,000 per trial of 15 epochs (240,000 images)" in text
    assert "bn_inception: missing: " in text
    assert "2 configurations x 2 folds x 2 seeds = 8 runs of 15 epochs" in text
    assert "only --dry-run needs none" in refused("sweep", space, "--as-published")
    assert "--probe is for a study" in refused("sweep", space, "--probe", "--smoke")
    assert "the steps need the images" in refused("sweep", space, "--dry-run", "--probe", "--as-published")
    folder = ROOT / "search_spaces" / "image_folder.yaml"
    assert "no published counts" in refused("sweep", folder, "--dry-run", "--as-published")


def scores(recall_at_1, map_at_r, half_width):
    return {
        "recall_at_1": {"mean": recall_at_1, "half_width": None},
        "map_at_r": {"mean": map_at_r, "half_width": half_width},
    }


MIC = {"configuration": "aaaabbbbcccc", "recipe": "mic: margin, distance_weighted", "from_trial": "search-000"}
SEARCHED = {"recipe": "margin", "best": None, "epoch_of_best": 3, "ended": "stopped_early"}
SUMMARY = {
    "study": "digits",
    "metric": "val_map_at_r",
    "plan": {"num_trials": 7, "num_grid_points": 1},
    "stability": {"num_missing": 9},
    "search": [
        {**SEARCHED, "trial": "search-000", "recipe": MIC["recipe"], "best": 0.9},
        *({**SEARCHED, "trial": f"search-{n:03d}", "best": 0.9 - n / 10} for n in range(1, 6)),
        {**SEARCHED, "trial": "search-006", "epoch_of_best": None, "ended": "non_finite_loss"},
    ],
    "confirm": [{**MIC, "mean": 0.8125, "half_width": 0.015, "num_runs": 4}],
    "final": [
        {
            **MIC,
            "metrics": scores(0.95, 0.7, 0.01),
            "untrained": scores(0.51, 0.3, 0.02),
            "validation": scores(0.97, 0.8125, 0.015),
            "untrained_validation": scores(0.62, 0.4, 0.03),
        }
    ],
}


def test_the_end_of_a_study(tmp_path, capsys):
    folder = make_study(tmp_path / "studies", "digits")
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    model = {"event": "model", "trial": None, "folder": "m", "checkpoint": "x", "name": "raydml-digits"}
    events.append(folder / "events.jsonl", model)
    studies.show_outcome("uv run launch.py", folder, studies.new_console())
    text = capsys.readouterr().out
    for words in (
        *("search-000 (mic: margin, distance_weighted)", "0.8125 ± 0.0150", "of 4 runs", "0.950", "0.510"),
        *("0.700 ± 0.010", "0.300 ± 0.020", "0.400 ± 0.030", "search-004"),
        *("studies/digits", "http://127.0.0.1:9", "models:/raydml-digits@challenger"),
    ):
        assert words in text
    assert "search-005" not in text
    for command in (
        "ui digits",
        "evaluate digits --on val",
        "export digits digits-model",
        "resume digits --num-trials 16",
    ):
        assert f"uv run launch.py {command}\n" in text, "a command must be alone on its line to be copied"


def test_the_end_of_a_search_on_several_folds_says_what_is_a_mean():
    console = studies.new_console()
    first, second, third, *others = SUMMARY["search"]
    searched = [{**first, "num_folds": 2}, {**second, "pruned": True, "num_folds": 1}, third, *others]
    with console.capture() as captured:
        console.print(tables.summary({**SUMMARY, "confirm": [], "final": [], "search": searched}))
    text = captured.get()
    assert "MAP@R 0.9000 on validation, mean over 2 folds" in text
    assert re.search(r"search-000 .* mean of 2\s*\n", text)
    assert re.search(r"search-001 .* 1, pruned\s*\n", text)
    assert re.search(r"search-002 .* 1\s*\n", text)


def test_the_list_of_studies_says_what_is_a_mean():
    row = {"trial": "search-001", "value": 0.75, "num_folds": 2}
    searched = [started(0), epoch(0, 1, 0.9), {**started(0), "trial": "search-000-fold-1"}]
    searched += [{**epoch(0, 1, 0.99), "trial": "search-000-fold-1"}]
    before = reduce_events([study_started(), stage_started(2), *searched])
    assert tables.best_text(before) == "search-000, 0.9000 (1 run)", "values of other folds are no better or worse"
    finished = {"event": "stage_finished", "stage": "search", "ranking": [row, {**row, "num_folds": 1}]}
    after = reduce_events([finished], before)
    assert tables.best_text(after) == "search-001, 0.7500 (mean of 2 folds)"
    assert live_view.line(after, finished) == "search finished, best search-001 MAP@R 0.7500 (mean of 2 folds)"
    plain = reduce_events([{**finished, "ranking": [{**row, "num_folds": 1}]}], before)
    assert tables.best_text(plain) == "search-000, 0.9000 (1 run)"


def test_a_search_alone_has_an_end_too():
    console = studies.new_console()
    with console.capture() as captured:
        console.print(tables.summary({**SUMMARY, "confirm": [], "final": []}))
    assert "MAP@R 0.9000 on validation, one run" in captured.get()
    with console.capture() as captured:
        console.print(tables.summary({**SUMMARY, "confirm": [], "final": [], "search": SUMMARY["search"][6:]}))
    assert "no trial has a value yet" in captured.get()


def test_refits_stand_beside_the_models_they_came_from(tmp_path):
    refit = {"classes": "development", "epochs": 3, "metrics": scores(0.96, 0.75, 0.02), "untrained": {}}
    runs = [{"trial": f"refit-00{seed}", "seed": seed, "ended": "finished"} for seed in (0, 1)]
    console = studies.new_console()
    with console.capture() as captured:
        final = [{**SUMMARY["final"][0], "refit": refit}]
        final[0]["footprint"] = footprint("search-000", 0)
        row = {**MIC, "classes": "development", "epochs": 3, "runs": runs}
        console.print(tables.summary({**SUMMARY, "final": final, "refit": [row]}))
    text = captured.get()
    assert "inference: 23.6 M parameters, 4.09 G MACs, 3 ms an image in batches of 1, 0.25" in " ".join(text.split())
    assert "refit   refit-000, refit-001 (mic: margin, distance_weighted)" in text
    assert "trained on all development classes; 3 epochs, last weights" in text
    (line,) = [line for line in text.splitlines() if line.startswith("MAP@R  ")]
    assert [part.strip() for part in line.split("  ") if part.strip()] == [
        "MAP@R", "0.750 ± 0.020", "0.700 ± 0.010", "0.300 ± 0.020", "0.812 ± 0.015",
    ]  # fmt: skip

    alone = summarise(write_published_study(tmp_path / "mic"))
    with console.capture() as captured:
        console.print(tables.summary(alone))
    text = captured.get()
    assert "winner" not in text
    assert "no trial has a value yet" not in text
    assert "search " not in text
    assert "0.340 ± 0.025" in text
    with console.capture() as captured:
        console.print(tables.summary({**alone, "refit": [{**alone["refit"][0], "classes": "all"}], "final": []}))
    assert "trained on all classes, the test classes included: never scored;" in " ".join(captured.get().split())


def test_status_lists_studies_and_shows_one(tmp_path, monkeypatch):
    monkeypatch.setattr("raydml.cli.results.new_console", lambda: Console(width=120))
    storage = tmp_path / "studies"
    config = {"epochs": 3, "loss": {"name": "contrastive"}, "data": {"split": {"fold": 1}}, "seed": 7}
    for name in ("confirmed", "killed", "new", "now"):
        path = make_study(storage, name) / "events.jsonl"
        if name == "new":
            continue
        recorded = [
            {"event": "study_started", "study": name, "config": {"select_on": "val_map_at_r"}},
            {"event": "stage_started", "stage": "search", "num_trials": 2, "max_epochs": 3},
            {"event": "trial_started", "trial": "search-000", "stage": "search", "config": config},
            {
                "event": "epoch",
                "trial": "search-000",
                "stage": "search",
                "epoch": 1,
                "metrics": {"val_map_at_r": 0.4321},
            },
            {"event": "trial_ended", "trial": "search-000", "stage": "search", "reason": "finished"},
        ]
        lucky = {"val_map_at_r": 0.9876}
        if name == "confirmed":
            recorded += [
                {"event": "stage_finished", "stage": "search"},
                {"event": "stage_started", "stage": "confirm", "num_trials": 2, "configurations": ["abc"]},
                {"event": "trial_started", "trial": "confirm-000", "stage": "confirm", "config": config}
                | {"configuration": "abc"},
                {"event": "epoch", "trial": "confirm-000", "stage": "confirm", "epoch": 1, "metrics": lucky},
                {"event": "stage_finished", "stage": "confirm"}
                | {"ranking": [{"from_trial": "search-000", "mean": 0.7202, "half_width": 0.2096}]},
                {"event": "study_finished"},
            ]
        for event in recorded:
            events.append(path, event)
    with filelock.FileLock(storage / "now" / LOCK):
        rows = [re.split(r" {2,}", row.strip()) for row in run("status").output.splitlines()]
        running = run("status", "now").output
    table = "\n".join(" ".join(row) for row in rows)
    assert "confirmed done done - search-000, 0.7202 ± 0.2096 finished" in table, "not the luckiest run"
    assert re.search(r"killed 1/2 - - search-000, 0\.4321 \(1 run\) interrupted \d s ago", table)
    assert "new - - - not started" in table
    assert "now 1/2 - - search-000, 0.4321 (1 run) running" in table
    assert "To continue killed: launch.py resume killed" in " ".join(table.split())
    assert "resume now" not in table
    assert "search, about " in running, "what it does, and how long still"
    one = run("status", "confirmed").output
    assert re.search(r"confirm-000 +A +contrastive +1 +7 +1/3 +0\.9876", one), "a run names its configuration"
    assert "To continue" not in one
    refused("status", "klled")
    assert "no studies" in run("status", "--storage", "nowhere").output
    (storage / "killed" / "study.json").unlink()
    listed = run("status").output
    assert "killed/study.json is missing, beside the events of a study. Cure: put it back" in " ".join(listed.split())
    assert "confirmed" in listed


def test_a_finished_study_has_nothing_to_do(tmp_path):
    folder = make_study(tmp_path / "studies", "made")
    events.append(folder / "events.jsonl", {"event": "study_started", "study": "made", "config": {}})
    events.append(folder / "events.jsonl", {"event": "study_finished"})
    assert "nothing to do" not in done("status", "made").output, "the search has no result"
    (folder / "ranking.json").write_text("[]")
    for command in ("status", "resume"):
        assert "made is finished; nothing to do" in done(command, "made").output
    assert "resume made --num-trials N" in done("resume", "made").output
    made, unvalidated = read_study(folder), {"data": {"split": {"val_fraction": 0.0}}}
    write_json(folder / "study.json", {**made, "trials": [unvalidated]})
    (folder / "refit.json").write_text("[]")
    assert "--num-trials" not in done("resume", "made").output, "there is no search to extend"
    write_json(folder / "study.json", made)
    events.append(folder / "events.jsonl", {"event": "stage_started", "stage": "search"})
    assert "nothing to do" not in done("status", "made").output, "it was extended"


def test_ui_opens_the_store_of_the_study_on_this_machine_only(tmp_path, monkeypatch):
    store = tmp_path / "studies" / "mlflow.db"
    make_study(tmp_path / "studies", "digits", tracking_uri=f"sqlite:///{store}")
    store.write_text("")
    seen = []

    def serve(uri, port, on_answer):
        seen.append((uri, port))
        on_answer()
        return 0

    calls = []
    monkeypatch.setattr(mlflow_store, "runs_page", lambda uri: calls.append(uri) or "/#/the/runs")
    monkeypatch.setattr(server, "serve_ui", serve)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert str(port) in refused("ui", "digits", "--port", port)
        monkeypatch.setattr(server, "FIRST_PORT", port)
        free = done("ui", "digits")
    assert f"http://127.0.0.1:{port}" not in free.output
    ((uri, given),) = seen
    assert uri == f"sqlite:///{store}"
    assert f"http://127.0.0.1:{given}/#/the/runs " in free.output
    command = server._command(uri, given)
    assert command[command.index("--backend-store-uri") + 1] == uri
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert calls == [f"sqlite:///{store}"]


def test_ui_makes_no_empty_store(tmp_path):
    assert "mlflow.db" in refused("ui", "--storage", "nowhere")
    assert not (tmp_path / "nowhere").exists()


def listed(kind):
    return json.loads(run("list", kind, "--json").output)


@pytest.mark.parametrize("kind", registry.KINDS)
def test_list_shows_every_plugin_with_its_settings(kind):
    rows = {row["name"]: row for row in listed(kind)}
    assert tuple(sorted(rows)) == registry.names(kind)
    lines = run("list", kind).output.splitlines()
    for name, row in rows.items():
        assert any(line.split() == [name, *row["about"].split()] for line in lines)
        assert row["source"] or kind == "methods" or name == "uniform"
        assert len(row["about"]) > 10
        fields = registry.settings_model(kind, name).model_fields
        assert set(row["settings"]) == set(fields)
        for setting, field in fields.items():
            assert json.loads(row["settings"][setting]["default"]) == json.loads(json.dumps(field.default))
            assert len(row["settings"][setting]["about"]) > 10, (name, setting)
    name, row = list(rows.items())[-1]
    text = " ".join(run("list", kind, name).output.split())
    for part in (row["about"], row["source"], row["fits"], *(one["about"] for one in row["settings"].values())):
        assert part in text


def test_a_search_may_start_from_points_and_limits_are_those_of_the_options(monkeypatch):
    """The dry run says what it begins with; what the space does not hold is named, and a wrong budget refused."""
    Path("space.yaml").write_text(SPACE)
    Path("points.yaml").write_text("first: [{seed: 3}, {seed: 400}]")
    begun = ("sweep", "space.yaml", "--set", "trial.seed={randint: [0, 9]}", "--num-trials", "3")
    said = done(*begun, "--start-from", "points.yaml", "--dry-run")
    assert "1 point of study.search.first" in " ".join(said.output.split())
    assert "trial.seed = 400 is not in {'randint': [0, 9]}" in " ".join(said.stderr.split())
    assert "is not above 0. Cure: write 0.5, 8 or 40" in refused(*begun, "--max-gpu-hours", "0")
    calls = []
    monkeypatch.setattr("raydml.cli.studies.create", lambda *_: Path("x"))
    monkeypatch.setattr("raydml.cli.studies.run_and_show", lambda *arguments: calls.append(arguments[3]))
    done(*begun, "--max-gpu-hours", "2.5", "--until-settled", "--time", "10m")
    assert calls == [Budget(600.0, 2.5, True)]


def test_list_without_a_kind_names_all_and_a_wrong_name_gives_the_nearest():
    assert "nt_xent, proxy_anchor" in run("list").output
    assert "did you mean 'margin'?" in refused("list", "losses", "margn")


def test_list_spaces_says_data_question_and_cost():
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in run("list", "spaces").output.splitlines() if line}
    assert set(lines) >= {path.stem for path in (ROOT / "search_spaces").glob("*.yaml")}
    assert lines["mic_cub200"].startswith("cub200: ")
    assert lines["digits"].startswith("digits: which of four loss families, ")
    assert lines["digits"].endswith("never seen? Cost: 1 min 52 s on 2 CPU cores, once installed")
    assert "never seen?" in run("list", "spaces", "digits").output


def test_list_says_what_fits():
    for kind, expected in {
        "losses": {"multi_similarity": "takes pairs", "arcface": "takes labels alone, no miner"},
        "miners": {"hardest": "yields triplets", "all": "yields pairs or triplet_ranges, by its settings"},
        "regularizers": {
            "rho": "needs a miner that yields triplets",
            "cross_batch_memory": "needs a loss that takes pairs",
            "mdr": "",
        },
    }.items():
        fits = {row["name"]: row["fits"] for row in listed(kind)}
        assert {name: fits[name] for name in expected} == expected


def test_list_says_types_and_limits():
    margin, schedules = ({row["name"]: row["settings"] for row in listed(kind)} for kind in ("losses", "schedules"))
    assert [margin["margin"]["beta"][key] for key in ("type", "default")] == ["float > 0", "1.2"]
    assert [margin["margin"]["class_beta"][key] for key in ("type", "default")] == ["bool", "true"]
    milestones = {"type": "list of int >= 1", "default": "required", "about": "numbers of epochs, in rising order"}
    assert schedules["step"]["milestones"] == milestones


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("samplers", {"class_balanced", "uniform"}),
        ("optimizers", {"adamw", "adam", "sgd", "rmsprop"}),
        ("backbones", {"convnet", "resnet18", "resnet50", "googlenet", "convnext_tiny", "vit_b_16"}),
    ],
)
def test_list_shows_the_closed_sets(kind, names):
    assert {row["name"] for row in listed(kind)} >= names


def test_schema_is_printed_and_written_where_the_spaces_look_for_it(tmp_path, monkeypatch):
    from raydml.search_space.json_schema import json_schema

    schema = json.loads(json.dumps(json_schema()))  # where a tuple is a list
    assert json.loads(run("schema").output) == schema
    monkeypatch.chdir(tmp_path)
    assert "there is no folder search_spaces here" in run("schema", "--write").stderr
    Path("search_spaces").mkdir()
    run("schema", "--write")
    assert json.loads(Path("search_spaces/schema.json").read_text()) == schema


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint made by the `trial` command, and the epochs it printed."""
    folder = tmp_path_factory.mktemp("trained")
    config = write_trial(folder / "trial.json")
    result = done("trial", config, "--json", "--save", str(folder / "checkpoint"))
    return folder, [json.loads(row) for row in result.stdout.splitlines()]


def test_trial_gives_the_numbers_of_the_trainer(trained):
    from raydml.config.trial import Machine, parse_trial
    from raydml.training.trainer import Trainer

    _, epochs = trained
    expected = list(Trainer(parse_trial(TRIAL), Machine(), device="cpu").epochs())
    assert [row["epoch"] for row in epochs] == [1, 2]
    for name in ("train_loss", "val_recall_at_1", "val_map_at_r"):
        assert [row[name] for row in epochs] == [row[name] for row in expected]
    assert epochs[-1]["ended"] == "finished"


def test_trial_stops_early_without_becoming_another_experiment(trained, tmp_path):
    folder, epochs = trained
    result = run("trial", str(folder / "trial.json"), "--max-epochs", "1", "--save", "here")
    rows = [row for row in result.stdout.splitlines() if row.strip()[:1].isdigit()]
    assert len(rows) == 1
    assert f"{epochs[0]['val_map_at_r']:.4f}" in rows[0]
    cards = [json.loads((path / "model.json").read_text()) for path in (folder / "checkpoint", tmp_path / "here")]
    assert cards[0]["fingerprint"] == cards[1]["fingerprint"]
    assert run("trial", str(folder / "trial.json"), "--save", "here").exit_code == 2, "it would overwrite"


def test_trial_finds_configurations_in_a_study(tmp_path):
    other = {**TRIAL, "seed": 7}
    folder = make_study(tmp_path / "studies", "digits", trials=[TRIAL, other], machine={"cpus_per_trial": 2})
    started = {"event": "trial_started", "stage": "confirm", "trial": "confirm-000", "fingerprint": "x"}
    events.append(folder / "events.jsonl", {**started, "config": {**TRIAL, "seed": 9}})
    for key, seed in (("search-000", 0), ("search-001", 7), ("confirm-000", 9)):
        trial, machine = studies.read_trial(f"digits:{key}", Path("studies"), Path("images"))
        assert (trial.seed, machine.cpus_per_trial, machine.data_root) == (seed, 2, (tmp_path / "images"))
    with pytest.raises(ValueError, match=r"no trial 'search-002'.*search-001"):
        studies.read_trial("digits:search-002", Path("studies"), None)


def test_trial_runs_trial_0_of_a_search_space(tmp_path):
    from raydml.config.trial import Machine, parse_trial
    from raydml.training.trainer import Trainer

    text = f"study: {{seed: 5, search: {{num_trials: 2}}}}\ntrial: {json.dumps(TRIAL)}\n"
    (tmp_path / "space.yaml").write_text(text.replace("0.001", "{choice: [0.001, 0.1], first: 0.001}"))
    result = done("trial", "space.yaml", "--json", "--max-epochs", "1", "--set", "trial.model.embedding_dim=8")
    (row,) = [json.loads(row) for row in result.stdout.splitlines()]
    alone = {**TRIAL, "seed": 5, "model": {**TRIAL["model"], "embedding_dim": 8}}
    expected = next(Trainer(parse_trial(alone), Machine(), device="cpu").epochs())
    assert row["val_map_at_r"] == expected["val_map_at_r"]


def test_trial_names_all_mistakes_of_a_file_at_once_with_their_lines(tmp_path):
    (tmp_path / "space.yaml").write_text("trial: {epochs: 2}\n")
    error = refused("trial", "space.yaml")
    for key in ("trial.data", "trial.model", "trial.loss", "trial.sampler"):
        assert key in error
    error = refused("trial", write_trial(tmp_path / "wrong.json", epochs=0, sedd=1))
    for words in ("wrong.json:1", "epochs = 0", "sedd"):
        assert words in error
    make_study(tmp_path / "studies", "digits", trials=[TRIAL])
    assert "--set trial.epochs=1 is for a file" in refused("trial", "digits:search-000", "--set", "trial.epochs=1")


def test_evaluate_gives_the_validation_numbers_of_the_best_epoch(trained):
    folder, epochs = trained
    result = done("evaluate", str(folder / "checkpoint"), "--json")
    report = json.loads(result.stdout)
    best = max(epochs, key=lambda row: row["val_map_at_r"])
    assert report["epoch"] == best["epoch"]
    for name, value in report["metrics"].items():
        assert value == pytest.approx(best[f"val_{name}"], abs=1e-6)
    assert set(report["untrained"]) == set(report["metrics"])
    table = run("evaluate", str(folder / "checkpoint")).output
    assert f"{best['val_map_at_r']:.4f}" in table


def test_an_exported_model_scores_the_same(trained, tmp_path):
    folder, _ = trained
    done("export", str(folder / "checkpoint"), "model")
    first, second = (json.loads(run("evaluate", t, "--json").output) for t in (folder / "checkpoint", "model"))
    assert first["metrics"] == second["metrics"]
    done("export", "model", "copy")
    weights = (folder / "checkpoint" / "weights.safetensors").read_bytes()
    assert (tmp_path / "copy" / "model.safetensors").read_bytes() == weights
    assert run("export", "model", "copy").exit_code == 2, "it would overwrite"


def test_every_read_of_the_test_classes_is_recorded(trained, tmp_path, monkeypatch):
    folder, _ = trained
    study = make_study(tmp_path / "studies", "digits")
    (study / "search").mkdir()
    shutil.copytree(folder / "checkpoint", study / "search" / "checkpoint")
    synced = []
    tracking = SimpleNamespace(sync=lambda *arguments, **_: synced.append(arguments) or True)
    monkeypatch.setitem(sys.modules, "raydml.tracking.delivery", tracking)
    inside = "studies/digits/search/checkpoint"
    done("evaluate", inside, "--on", "val")
    assert not (study / "test_reads.jsonl").exists()
    done("evaluate", inside, "--on", "test")
    (read,) = (json.loads(row) for row in (study / "test_reads.jsonl").read_text().splitlines())
    assert read["purpose"] == "evaluate"
    assert read["checkpoint"].endswith("search/checkpoint")
    (event,) = events.read(study / "events.jsonl")
    assert event["event"] == "test_read"
    assert len(synced) == 1, "the read is recorded in MLflow too"
    done("evaluate", str(folder / "checkpoint"), "--on", "test")
    assert len((tmp_path / "studies" / "test_reads.jsonl").read_text().splitlines()) == 1


def test_every_read_of_the_test_classes_by_a_model_from_mlflow_is_recorded_there_too(trained, tmp_path, monkeypatch):
    """A real store: in the run of the model, in the study if it lies here, and before an image is opened."""
    from raydml.inference import evaluate
    from raydml.inference.export import export_model
    from raydml.tracking import delivery as tracking

    trained_folder, _ = trained
    storage = tmp_path / "studies"
    uri = mlflow_store.default_uri(storage)
    study = make_study(storage, "digits", tracking_uri=uri)
    about = {"study": "digits", "study_id": "0" * 32, "storage": str(storage), "config": {}, "commit": "c0ffee"}
    model = export_model(trained_folder / "checkpoint", tmp_path / "exported")
    for event in (
        {"event": "study_started", **about},
        {"event": "trial_started", "trial": "confirm-000", "stage": "confirm", "config": TRIAL},
        {"event": "model", "trial": "confirm-000", "checkpoint": "/c", "folder": str(model), "name": "digits"},
        {"event": "trial_ended", "trial": "confirm-000", "reason": "finished"},
        {"event": "study_finished"},
    ):
        events.append(study / "events.jsonl", event)
    assert tracking.sync(study / "events.jsonl", uri, "digits")
    client = mlflow_store.connect(uri)
    version = client.get_model_version_by_alias("digits", "champion")
    run_id = version.run_id
    parent_id = client.get_run(run_id).data.tags["mlflow.parentRunId"]

    def reads(run):
        return [
            json.loads(Path(client.download_artifacts(run, item.path)).read_text())
            for item in client.list_artifacts(run, "test_reads")
        ]

    def rows(folder):
        path = folder / "test_reads.jsonl"
        return [json.loads(row) for row in path.read_text().splitlines()] if path.exists() else []

    def seen_before_opening(*_, **__):
        at_opening.append((len(reads(run_id)), len(rows(study)) + len(rows(tmp_path / "elsewhere"))))
        return evaluate.Evaluation({"recall_at_1": 0.5, "untrained_recall_at_1": 0.25}, {}, {"leave_one_out": "so"})

    at_opening = []
    monkeypatch.setattr(evaluate, "evaluate_checkpoint", seen_before_opening)
    done("evaluate", "models:/digits/1", "--on", "val")
    assert (reads(run_id), rows(study), at_opening) == ([], [], [(0, 0)])
    done("evaluate", "models:/digits/1", "--on", "test")
    assert at_opening[1:] == [(1, 1)]
    (in_mlflow,) = reads(run_id)
    (row,) = rows(study)
    assert in_mlflow["checkpoint"] == row["checkpoint"] == "models:/digits/1"
    assert in_mlflow["commit"] == row["commit"]
    (event,) = [event for event in events.read(study / "events.jsonl") if event["event"] == "test_read"]
    assert event["checkpoint"] == "models:/digits/1"
    assert [read["checkpoint"] for read in reads(parent_id)] == ["models:/digits/1"], "the study's own run"
    assert rows(storage) == [], "one read, one record here"
    # The study does not lie in this storage: its run in MLflow hears of it all the same.
    away = ("--storage", "elsewhere", "--tracking-uri", uri)
    done("evaluate", f"runs:/{run_id}", "--on", "test", *away)
    assert at_opening[2:] == [(2, 2)]
    assert [read["checkpoint"] for read in reads(run_id)] == ["models:/digits/1", f"runs:/{run_id}"]
    assert [row["checkpoint"] for row in rows(tmp_path / "elsewhere")] == [f"runs:/{run_id}"]
    # A study of the same name that is another one.
    make_study(tmp_path / "other", "digits", study_id="1" * 32)
    done("evaluate", f"runs:/{run_id}", "--on", "test", "--storage", "other", "--tracking-uri", uri)
    assert rows(tmp_path / "other" / "digits") == []
    assert len(rows(tmp_path / "other")) == 1
    # What cannot be recorded is not read.
    client.create_model_version("digits", source=version.source)
    assert "registered without a run" in refused("evaluate", "models:/digits/2", "--on", "test")
    assert len(at_opening) == 4
    assert len(rows(study)) == 1


def test_evaluate_refuses_what_holds_no_model(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no checkpoint and no exported model" in refused("evaluate", "empty")
    for command in ("evaluate", "resume", "sync", "report"):
        assert "no study 'nothing'" in refused(command, "nothing")


def test_evaluate_does_not_look_for_models_in_folders_below_the_one_that_was_named(tmp_path):
    stranger = tmp_path / "somebody" / "trial" / "checkpoint_000000"
    stranger.mkdir(parents=True)
    (stranger / "model.json").write_text("{}")
    with pytest.raises(arguments.CommandError, match="no checkpoint and no exported model"):
        arguments.find_model(str(tmp_path), tmp_path / "studies", None, tmp_path)


def test_the_home_folder_is_expanded_where_a_shell_leaves_it(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    given = ["--data-root=~/photos", "~/x.yaml", "--set", "machine.data_root=~/y", "--name", "a~b", "~nobody-here/x"]
    expected = ["--data-root=/home/me/photos", "/home/me/x.yaml", *given[2:]]
    assert main.with_home_folders(given) == expected


def test_started_as_a_module_it_prints_commands_that_start_the_module(monkeypatch):
    monkeypatch.delenv("UV_RUN_RECURSION_DEPTH", raising=False)
    assert main.program_name("/site-packages/raydml/__main__.py") == "python -m raydml"
    monkeypatch.setenv("UV_RUN_RECURSION_DEPTH", "1")
    assert main.program_name("/site-packages/raydml/__main__.py") == "uv run python -m raydml"


def test_names_in_messages_are_as_they_were_typed():
    assert main.as_typed("no study 'caf\\udce9 \\n'") == "no study 'caf\udce9 \\n'"


@pytest.mark.parametrize("place", ["file/x", "file", "x" * 300, "file/y/z"])
def test_what_cannot_be_written_is_refused_before_the_work(tmp_path, place):
    (tmp_path / "file").write_text("kept")
    write_trial(tmp_path / "t.yaml")
    make_study(tmp_path / "studies")
    for command in (
        ("trial", "t.yaml", "--save", place),
        ("export", "digits", place),
        ("index", "digits", ".", place),
        ("report", "digits", "--out", place),
        ("query", "gallery", "x.png", "--picture", place if place != "file" else "."),
        ("evaluate", "digits", "--save-embeddings", f"{place}/x.npz"),
    ):
        message = refused(*command)
        assert "that can be written" in message, command
        assert place[:9] in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "studies", "t.yaml"]
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize(
    "arguments",
    [
        ["sweep", "digits", "--dry-run", "--data-root", "gs://bucket/images"],
        ["sweep", "digits", "--dry-run", "--set", "machine.cache_dir=abfs://bucket/cache"],
        ["export", "digits", "s3://bucket/model"],
        ["sweep", "s3://bucket/images"],
        ["init", "s3://bucket/images"],
        ["index", "digits", "s3://bucket/images", "gallery"],
    ],
)
def test_the_address_of_a_store_is_no_folder(arguments, tmp_path):
    """`Path` would make a folder named s3: in the folder of the command."""
    make_study(tmp_path / "studies")
    message = refused(*arguments)
    assert "://bucket/" in message
    assert "is an address, and must be a folder. Cure: mount the store" in message
    assert [path.name for path in tmp_path.iterdir()] == ["studies"]


def test_a_study_in_a_store_is_named_by_its_address_and_a_place_for_new_ones_only_by_sweep():
    said = refused("status", "--storage", "s3://bucket/studies")
    assert "Cure: name the study by its address, s3://BUCKET/PREFIX/NAME; sweep takes one as --storage" in said
    said = refused("sweep", "digits", "--storage", "s3://key:secret@bucket/studies")
    assert "has credentials, which would be recorded. Cure: set them in the environment" in said
    said = refused("sweep", "digits", "--smoke", "--storage", "s3://bucket/studies")
    assert "--smoke runs a miniature on generated images, and --storage s3://bucket/studies is for a study" in said


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("http://127.0.0.1:8265", "Cure: submit in the place of this command, which starts a study there"),
        ("ray://127.0.0.1:10001", "is not the head of a Ray cluster"),
        ("nonsense", "is not the head of a Ray cluster"),
        ("local", "is not the head of a Ray cluster"),
        ("127.0.0.1:99999", "is not the head of a Ray cluster"),
        ("127.0.0.1:1", "nothing answers there (Connection refused). Cure: start the cluster"),
    ],
)
def test_an_address_that_cannot_be_a_cluster_is_refused_before_a_study_is_made(address, words, tmp_path):
    assert words in refused("sweep", "digits", "--storage", tmp_path / "studies", "--address", address)
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_no_file_system_takes_is_a_mistake_of_the_user():
    for command in (("status", "x" * 300), ("sweep", "x" * 300), ("trial", "x" * 300)):
        assert "name too long" in refused(*command).lower()


@pytest.mark.slow
def test_the_program_as_a_module_and_with_names_outside_utf_8():
    """One process for each: the module, a name that is not UTF-8 in two locales, and a full standard output."""
    command = [sys.executable, "-m", "raydml"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, env=environment, check=True)
    assert version.stdout.startswith("raydml ")
    ascii_locale = {"PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}
    for locale, shown in (({"PYTHONUTF8": "1"}, b"'caf\xe9'"), (ascii_locale, b"'caf")):
        status = [*map(os.fsencode, [*command, "status"]), b"caf\xe9"]
        done = subprocess.run(status, capture_output=True, env={**environment, **locale}, check=False)
        assert done.returncode == 2
        assert b"no study " + shown in done.stderr
    done = subprocess.run(
        [*status[:-2], b"export", b"a", b"caf\xe9"], capture_output=True, env=environment, check=False
    )
    assert done.returncode == 2
    assert b"caf\xe9': the name is not UTF-8. Cure" in done.stderr
    with open("/dev/full", "w") as full:
        listing = [*command, "list", "miners"]
        done = subprocess.run(listing, stdout=full, stderr=subprocess.PIPE, env=environment, check=False)
    assert done.returncode == 2
    assert b"No space left on device" in done.stderr
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr


@pytest.mark.slow
def test_a_trial_on_images_whose_names_are_not_utf_8(tmp_path):
    """Folders unpacked on another system, an emoji, "(1)", half of each class in train/ and in val/."""
    root = os.fsencode(tmp_path) + b"/gr\xfcn \xf0\x9f\x98\x80"
    for number in range(8):
        for part in (b"train", b"val"):
            folder = root + b"/" + part + b"/caf\xe9 %d" % number
            os.makedirs(folder)
            for index in range(2):
                path = os.fsdecode(folder + b"/\xfc (%d).png" % index)
                Image.new("RGB", (8, 8), (30 * number, 10 * index, len(part))).save(path)
    data = {**TRIAL["data"], "name": "image_folder"}
    sampler = {"name": "class_balanced", "classes_per_batch": 2, "images_per_class": 2}
    write_trial(tmp_path / "t.yaml", epochs=1, data=data, sampler=sampler, recall_at=[1])
    command = [sys.executable, "-m", "raydml", "trial", "t.yaml", "--data-root", root, "--storage", "st"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"}
    done = subprocess.run(command, capture_output=True, cwd=tmp_path, env=environment, check=False)
    output = (done.stdout + done.stderr).decode("utf-8", "surrogateescape")
    assert done.returncode == 0, output
    assert "8 classes" in output
    assert "8 class names in common (café 0, café 1, café 2 and 5 more)" in output


@pytest.mark.parametrize(("before", "after"), [(0o000, 0o002), (0o022, 0o022), (0o077, 0o077)])
def test_what_a_command_writes_is_not_writable_by_others(before, after):
    own = os.umask(before)
    try:
        done("list", "miners")
    finally:
        found = os.umask(own)
    assert found == after


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_a_command_that_trains_here_ends_at_a_signal_in_one_line(tmp_path, number, code):
    command = ["trial", "search_spaces/digits.yaml", "--set", "trial.epochs=500", "--storage", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "launch.py", *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    lines = iter(process.stdout.readline, "")
    assert any(line.split()[:1] == ["1"] for line in lines), "the first epoch"
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert err.splitlines()[-1] == "interrupted"
    assert "Traceback" not in err


def test_the_option_of_the_scheduler_has_the_choices_of_the_setting():
    from typing import get_args

    from raydml.cli.arguments import SchedulerOption
    from raydml.config.trial import SearchStage

    of_option = get_args(get_args(get_args(SchedulerOption)[0])[0])
    assert of_option == get_args(SearchStage.model_fields["scheduler"].annotation)
