"""What MLflow gets of a study: groups of metrics, the best epoch, what varies, names, data sets and notes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from raydml.study import events
from raydml.study.events import StudyState, reduce_events
from raydml.tracking.updates import RunUpdate, _place_in_search, grouped, nested, search_words, updates_of
from tests.study import study_events
from tests.tracking.test_delivery import Spool

SIZES = {
    "search": {"train": {"images": 40, "classes": 4}, "val": {"images": 20, "classes": 2}},
    "fold 1": {"train": {"images": 30, "classes": 3}, "val": {"images": 30, "classes": 3}},
}
TEST = {"test": {"images": 50, "classes": 5}}
CONTENT = "0b7e9c3202d7bcd255d6a19a238d3743bf5e320ba74812a6679958a017c55382"


def config_of(rate: float, fold: int | None = None, seed: int = 0) -> dict[str, Any]:
    return {
        "seed": seed,
        "epochs": 3,
        "data": {"name": "glyphs", "content": CONTENT, "split": {"fold": fold}},
        "model": {"backbone": "convnet"},
        "loss": {"name": "margin", "beta": 1.2},
        "optimizer": {"learning_rate": rate},
    }


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path)


def start(spool: Spool) -> None:
    spool.add(
        "study_started", study="digits", study_id="0" * 32, storage=str(spool.folder.parent), commit="c0ffee",
        config={"select_on": "val_map_at_r"}, dataset="glyphs", user="ann", command="uv run launch.py sweep a.yaml",
        constant={"loss": "margin", "loss.margin.beta": 1.2, "model.backbone": "convnet"},
        varying=["optimizer.learning_rate"], splits={name: {**parts, **TEST} for name, parts in SIZES.items()},
    )  # fmt: skip


def started(spool: Spool, trial: str, **config: Any) -> None:
    stage = trial.split("-")[0]
    spool.add("trial_started", trial=trial, stage=stage, fingerprint=f"f{trial}", configuration="fsearch-000",
              config=config_of(1e-3, **config))  # fmt: skip


def updates(spool: Spool) -> dict[str | None, RunUpdate]:
    return {
        update.trial: update for update in updates_of(events.records(spool.path)[0], StudyState(), {}, spool.folder)[1]
    }


def test_a_run_has_its_name_and_begins_with_its_first_event(spool: Spool) -> None:
    start(spool)
    started(spool, "search-000")
    started(spool, "search-001")
    first: dict[str | None, float] = {}
    for event in events.read(spool.path):
        first.setdefault(event.get("trial"), event["time"])
    found = updates(spool)
    assert {key: update.start_ms for key, update in found.items()} == {
        key: round(time_s * 1000) for key, time_s in first.items()
    }
    assert found[None].name == "digits"


@pytest.mark.parametrize(
    ("command", "source"),
    [
        ("uv run launch.py sweep a.yaml", "uv run launch.py sweep a.yaml"),
        ("/opt/python launch.py sweep spaces/a.yaml --storage 's3://bucket/x?endpoint_override=http://host:9000'",
         "python launch.py sweep a.yaml"),
        ("python -m raydml sweep '/mnt/my images/' --name birds", "python -m raydml sweep my images"),
        ("Study.start('/spaces/a.yaml')", "Study.start(a.yaml)"),
        ("python launch.py sweep it's.yaml --set a=/b", "python launch.py sweep it's.yaml"),
        ("", ""),
    ],
)  # fmt: skip
def test_the_source_of_a_study_can_be_read_where_mlflow_shows_what_follows_the_last_slash(
    spool: Spool, command: str, source: str
) -> None:
    spool.add("study_started", study="digits", study_id="0" * 32, config={}, command=command)
    tags = updates(spool)[None].tags
    assert (tags.get("mlflow.source.name", ""), tags.get("raydml.command", "")) == (source, command)


def test_metrics_are_grouped_by_what_they_measure() -> None:
    names = {
        "val_map_at_r": "val/map_at_r",
        "val_binary_recall_at_1": "val/binary_recall_at_1",
        "train_loss": "train/loss",
        "gradient_norm": "train/gradient_norm",
        "learning_rate": "train/learning_rate",
        "images_per_s": "speed/images_per_s",
        "system_gpu_percent": "system/gpu_percent",
        "epoch_s": "speed/epoch_s",
        "test_map_at_r": "test/map_at_r",
        "test_untrained_map_at_r": "untrained/map_at_r",
        "untrained_map_at_r": "untrained/map_at_r",
        "val_untrained_map_at_r": "untrained/val_map_at_r",
        "test_ensemble_map_at_r": "ensemble/map_at_r",
        "search_best_val_map_at_r": "search/best_map_at_r",
        "confirmed_val_map_at_r": "confirmed/map_at_r",
    }
    for name, expected in names.items():
        assert grouped({name: 1}) == {expected: 1}
    assert grouped({"best_val_map_at_r": 1}) == {}, "the best epoch has a group of its own"


def test_the_headline_is_the_best_epoch_with_all_its_metrics(spool: Spool) -> None:
    start(spool)
    started(spool, "search-000")
    for epoch, value, recall in ((1, 0.2, 0.9), (2, 0.61012693, 0.7), (3, 0.5488, 0.8)):
        metrics = {"val_map_at_r": value, "val_recall_at_1": recall, "learning_rate": 1e-3}
        spool.add("epoch", trial="search-000", stage="search", epoch=epoch, metrics=metrics)
    sent = updates(spool)["search-000"].points
    assert [(point.step, point.value) for point in sent if point.name == "val/map_at_r"] == [
        (1, 0.2), (2, 0.610127), (3, 0.5488)
    ]  # fmt: skip
    single = {point.name: point.value for point in sent if point.step == 0}  # the last one counts
    best = {"best/map_at_r": 0.610127, "best/recall_at_1": 0.7, "best/selected": 0.610127, "best/epoch": 2}
    assert single == {**best, "train/epochs": 3}
    times = [point.time_ms for point in sent if point.name == "best/map_at_r"]
    assert times == sorted(set(times)), "each later than the one that it replaces"
    assert not [point for point in sent if point.name == "train/learning_rate"], "constant: a parameter, no chart"


def test_a_run_has_what_varies_and_the_study_what_does_not(spool: Spool) -> None:
    start(spool)
    started(spool, "search-000")
    started(spool, "confirm-000", fold=1, seed=2)
    found = updates(spool)
    assert found["search-000"].params == {"optimizer.learning_rate": "0.001"}
    assert found["confirm-000"].params == {"optimizer.learning_rate": "0.001", "fold": "1", "seed": "2"}
    assert found[None].params == {
        "select_on": "val_map_at_r", "loss": "margin", "loss.margin.beta": "1.2", "model.backbone": "convnet"
    }  # fmt: skip
    configs = {key: [yaml.safe_load(file.text) for file in update.files] for key, update in found.items()}
    assert configs["search-000"] == [config_of(1e-3)], "what `launch.py trial` takes"
    assert configs[None] == [
        {
            "study": {"select_on": "val_map_at_r"},
            "trial": {"loss": {"name": "margin", "margin": {"beta": 1.2}}, "model": {"backbone": "convnet"}},
            "varies": ["optimizer.learning_rate"],
        }
    ]


def test_names_and_tags_are_for_people(spool: Spool) -> None:
    start(spool)
    started(spool, "search-000")
    started(spool, "confirm-004", fold=1, seed=2)
    found = updates(spool)
    assert found["search-000"].name == "search-000 margin"
    assert found["confirm-004"].name == "confirm-004 A fold 1 seed 2 margin"
    assert found["confirm-004"].tags["raydml.configuration"] == "A"
    for update in found.values():
        assert update.tags["mlflow.user"] == "ann"
        assert update.tags["mlflow.source.name"] == "uv run launch.py sweep a.yaml"
        assert update.tags["mlflow.source.git.commit"] == "c0ffee"
        assert [text for text in update.tags.values() if text.startswith("/")] == []


def test_a_run_on_a_further_fold_says_so(spool: Spool) -> None:
    start(spool)
    started(spool, "search-000")
    started(spool, "search-000-fold-1", fold=1)
    found = updates(spool)
    further = found["search-000-fold-1"]
    assert further.name == "search-000-fold-1 margin"
    assert {name: further.tags[f"raydml.{name}"] for name in ("stage", "fold", "from_trial")} == {
        "stage": "search",
        "fold": "1",
        "from_trial": "search-000",
    }
    assert further.params == {"fold": "1", "optimizer.learning_rate": "0.001"}
    assert "raydml.from_trial" not in found["search-000"].tags
    assert "fold" not in found["search-000"].params
    (train, _) = further.datasets
    assert train.name == "glyphs fold 1 train"


def test_data_sets_carry_their_hash_counts_and_use(spool: Spool) -> None:
    start(spool)
    started(spool, "search-000")
    started(spool, "confirm-000", fold=1)
    before = updates(spool)
    facts = {
        key: [(part.name, part.context, dict(part.sizes)) for part in update.datasets] for key, update in before.items()
    }
    assert facts == {
        None: [],
        "search-000": [
            ("glyphs search train", "train", {"images": 40, "classes": 4}),
            ("glyphs search validation", "validation", {"images": 20, "classes": 2}),
        ],
        "confirm-000": [
            ("glyphs fold 1 train", "train", {"images": 30, "classes": 3}),
            ("glyphs fold 1 validation", "validation", {"images": 30, "classes": 3}),
        ],
    }
    assert {part.digest for part in before["search-000"].datasets} == {CONTENT[:36]}
    # The test classes appear with the stage that opens them, with the numbers of each run.
    scores = {"val": {}, "test": {"map_at_r": 0.25, "untrained_map_at_r": 0.125}, "protocols": {}}
    scores["footprint"] = {"parameters": 7, "macs": None, "embedding_bytes": 16, "ms_batch_1": 0.5, "device": "cpu"}
    spool.add("stage_finished", stage="finalize", ranking=[{"configuration": "f", "runs": {"confirm-000": scores}}])
    after = updates(spool)
    assert [part.context for part in after["search-000"].datasets] == ["train", "validation"]
    (_, _, test) = after["confirm-000"].datasets
    assert (test.name, test.context, dict(test.sizes)) == ("glyphs test", "test", {"images": 50, "classes": 5})
    assert [part.context for part in after[None].datasets] == ["train", "validation", "test"]
    tested = {point.name: point.value for point in after["confirm-000"].points}
    assert tested == {"test/map_at_r": 0.25, "untrained/map_at_r": 0.125} | {
        "footprint/parameters": 7, "footprint/embedding_bytes": 16, "footprint/ms_batch_1": 0.5,
    }  # fmt: skip


def test_a_refit_is_a_run_of_its_stage_with_its_own_parameters_images_and_test_scores(spool: Spool) -> None:
    start(spool)
    first = events.read(spool.path)[0]
    sizes = {"refit": {"train": {"images": 60, "classes": 6}, "val": {"images": 0, "classes": 0}, **TEST}}
    events.append(spool.path, {**first, "splits": {**first["splits"], **sizes}})
    spool.add("stage_started", stage="refit", num_trials=2, configurations=["frefit"])
    for number, split in enumerate(({"val_fraction": 0.0}, {"val_fraction": 0.0, "test_fraction": 0.0})):
        key = f"refit-{number:03d}"
        config = {**config_of(1e-3, seed=7), "epochs": 5}
        config["data"] = {**config["data"], "split": {"fold": None, **split}}
        spool.add("trial_started", trial=key, stage="refit", fingerprint=f"f{key}", configuration="frefit",
                  config=config)  # fmt: skip
        spool.add("epoch", trial=key, stage="refit", epoch=1, metrics={"train_loss": 0.5})
        spool.add("trial_ended", trial=key, stage="refit", reason="finished", error=None)
    tested = {"refit-000": {"val": {}, "test": {"map_at_r": 0.25, "untrained_map_at_r": 0.1}}}
    row = {"runs": {}, "refit": {"runs": tested, "classes": "development"}}
    spool.add("stage_finished", stage="finalize", ranking=[row])
    spool.add("summary", metrics={"test_refit_map_at_r": 0.25, "test_refit_untrained_map_at_r": 0.1}, tags={})
    found = updates(spool)
    run = found["refit-000"]
    assert run.name == "refit-000 A seed 7 margin"
    assert run.params == {"seed": "7", "epochs": "5", "optimizer.learning_rate": "0.001"}
    assert (run.tags["raydml.stage"], run.tags["raydml.trained_on"]) == ("refit", "all development classes")
    assert "raydml.fold" not in run.tags
    assert (
        found["refit-001"].tags["raydml.trained_on"] == "all classes, the test classes included: never scored on them"
    )
    points = {point.name: point.value for point in run.points}
    assert points == {"train/loss": 0.5, "train/epochs": 1, "test/map_at_r": 0.25, "untrained/map_at_r": 0.1}
    assert {(part.name, part.context) for part in run.datasets} == {
        ("glyphs refit train", "train"),
        ("glyphs test", "test"),
    }
    parent = {point.name: point.value for point in found[None].points}
    assert parent == {"refit/map_at_r": 0.25, "refit/untrained_map_at_r": 0.1}


def test_the_note_of_a_study_is_its_question_and_then_its_summary(spool: Spool) -> None:
    start(spool)
    (spool.folder / "space.yaml").write_text("# Question: which loss\n#   is best?\n#\nstudy: {}\n")
    assert updates(spool)[None].tags["mlflow.note.content"] == "Which loss is best?"
    (spool.folder / "space.yaml").write_bytes(b"# Question: is <b>it</b> [best](x)\xff?\n#\n")
    assert updates(spool)[None].tags["mlflow.note.content"] == "Is \\<b\\>it\\</b\\> \\[best\\](x)\ufffd?"
    (spool.folder / "summary.md").write_text("# Study digits\n\nA has the best mean.\n\n## Test classes\n\n| table |\n")
    note = updates(spool)[None].tags["mlflow.note.content"]
    assert note.startswith("# Study digits\n\nA has the best mean.\n\n[Report](")
    assert "table" not in note


def test_an_older_study_is_described_by_its_whole_configuration(spool: Spool) -> None:
    """Its events have neither the constant parameters nor the sizes of the splits."""
    spool.add("study_started", study="digits", study_id="0" * 32, config={"select_on": "val_map_at_r"})
    started(spool, "search-000")
    update = updates(spool)["search-000"]
    assert {"loss.name": "margin", "loss.beta": "1.2", "epochs": "3"}.items() <= update.params.items()
    assert update.datasets == []


def test_dotted_names_become_blocks() -> None:
    assert nested({"loss.margin.beta": 1, "loss": "margin", "a.b": [2]}) == {
        "loss": {"margin": {"beta": 1}, "name": "margin"},
        "a": {"b": [2]},
    }
    assert nested({}) == {}


def test_tags_say_who_proposed_a_trial_and_how_far_it_came_in_the_rungs() -> None:
    search = {"searcher": {"name": "tpe"}, "scheduler": "promotion", "grace_epochs": 1, "reduction_factor": 3}
    begun = {**study_events.study_started(), "config": {"select_on": "val_map_at_r", "search": search}}
    drawn = {"event": "trial_drawn", "stage": "search", "trial": "search-001", "config": {}, "point": {}}
    state = reduce_events(
        [
            begun,
            study_events.stage_started(2),
            study_events.started(0),
            study_events.epoch(0, 1, 0.5),
            drawn,
            study_events.started(1),
            study_events.epoch(1, 1, 0.5),
            study_events.epoch(1, 3, 0.6),
        ]
    )
    first, second = (_place_in_search(state.trials[f"search-00{number}"], state) for number in (0, 1))
    # Rungs of 9 epochs: 1 and 3.
    assert first == {"searcher": "random", "bracket": "rung 1 of 2"}
    assert second == {"searcher": "tpe", "bracket": "rung 2 of 2"}
    further = replace(state.trials["search-001"], trial="search-001-fold-1")
    assert _place_in_search(further, state) == {"searcher": "tpe", "bracket": None}, "no rung stops it"
    assert search_words(state.config) == {"searcher": "tpe", "scheduler": "promotion"}
    assert search_words({"search": {"scheduler": "asha"}}) == {"searcher": "random", "scheduler": "asha"}
