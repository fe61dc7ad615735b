"""A study on disk: made once, refused when it is another, found by name; ranking and confirmation."""

import getpass
import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raydml.config.trial import Machine, fingerprint, parse_study, parse_trial
from raydml.data.benchmarks import BENCHMARKS, PublishedCount
from raydml.data.catalog import DataError
from raydml.data.datasets import open_catalog
from raydml.data.miniatures import build
from raydml.search_space.space import load_space
from raydml.study import events
from raydml.study import folder as study_files
from raydml.study.description import description_of
from raydml.study.folder import StudyError, create_study, find_study, plan_study, read_study, report_to
from raydml.study.stages import _refuse_other_images, confirm_trials
from raydml.training.trial_images import Catalogs, open_development
from tests.data.own_images import folder_of, write_image, write_list

ROOT = Path(__file__).parents[2]
SPACE = """
study:
  name: mini
  search: {num_trials: 3}
  confirm: {top: 1, folds: 2, seeds: 2}
trial:
  epochs: 2
  data:
    name: %s
    resize_px: 8
    crop_px: 8
    split: {order: sorted, test_fraction: 0.5, val_fraction: 0.4, num_folds: 2}
  model: {backbone: convnet, weights: none, embedding_dim: 8}
  loss: {name: contrastive}
  sampler: {name: class_balanced, classes_per_batch: 2, images_per_class: 4, batches_per_epoch: 2}
  optimizer: {name: adamw, learning_rate: {loguniform: [1e-4, 1e-2]}}
  recall_at: [1]
"""


def space_at(folder, text=SPACE % "digits", overrides=()):
    path = folder / "mini.yaml"
    path.write_text(text)
    return load_space(path, overrides)


def make(folder, **changes):
    space = space_at(folder, **changes)
    return create_study(space, storage=folder / "studies", tracking_uri="sqlite:///x.db", space_text="text")


def test_a_study_records_no_password(tmp_path):
    space, settings = space_at(tmp_path), {"storage": tmp_path / "studies", "space_text": "text"}
    address = "http://ann:PLANTED@host:5000"
    for _ in range(2):  # made, and made again
        folder = create_study(space, tracking_uri=address, command=f"sweep --tracking-uri {address}", **settings)
        assert read_study(folder)["tracking_uri"] == "http://host:5000"
    report_to(folder, "postgresql://ann:PLANTED@host/db")
    assert read_study(folder)["tracking_uri"] == "postgresql://ann@host/db"
    assert [path for path in tmp_path.rglob("*") if path.is_file() and b"PLANTED" in path.read_bytes()] == []


def test_a_run_is_created_by_the_login_and_without_one_by_the_user_of_the_process(tmp_path):
    """On the head of a cluster all jobs have the same one."""
    space, options = space_at(tmp_path), {"tracking_uri": "http://host:5000", "space_text": "text"}
    folder = create_study(space, storage=tmp_path / "first", user="ann", **options)
    catalog = open_catalog("digits", None)
    assert description_of(folder, read_study(folder), catalog)["user"] == "ann"
    without = create_study(space, storage=tmp_path / "second", **options)
    assert description_of(without, read_study(without), catalog)["user"] == getpass.getuser()


def image_folder(root, num_classes=8, per_class=4):
    rng = np.random.default_rng(0)
    for number in range(num_classes):
        (root / f"class{number}").mkdir(parents=True)
        for image in range(per_class):
            pixels = rng.integers(0, 255, (10, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / f"class{number}" / f"{image}.png")
    return root


def test_the_same_specification_is_the_same_study(tmp_path):
    first = make(tmp_path)
    before = (first / "study.json").read_bytes()
    assert make(tmp_path) == first
    assert (first / "study.json").read_bytes() == before


def test_the_same_study_may_move_to_another_machine(tmp_path):
    folder = make(tmp_path, overrides=["machine.gpus_per_trial=1"])
    assert make(tmp_path, overrides=["machine.gpus_per_trial=0"]) == folder
    assert json.loads((folder / "study.json").read_text())["machine"]["gpus_per_trial"] == 0


def test_another_specification_under_the_name_is_refused_with_a_free_name(tmp_path):
    make(tmp_path)
    with pytest.raises(StudyError, match=r"--name mini-2.*launch.py resume /.*/mini"):
        make(tmp_path, overrides=["trial.epochs=3"])


def test_a_study_without_refit_has_the_hash_that_it_had_before_the_stage_existed():
    study = parse_study({"name": "a", "confirm": {"top": 1}, "finalize": {}}).model_dump(mode="json")
    # Computed by the version before.
    before = "475aff81040a237fe2635280061b63ef2b6f5eb8bc2322b2a7a7d7c4eef674a9"
    assert study["refit"] is None
    assert study_files.specification_of(study, [{"epochs": 3}])["specification"] == before
    older = {name: value for name, value in study.items() if name != "refit"}
    assert study_files.specification_of(older, [{"epochs": 3}])["specification"] == before
    refit = parse_study({"refit": {}}).refit.model_dump(mode="json")
    assert study_files.specification_of({**study, "refit": refit}, [{"epochs": 3}])["specification"] != before


def test_the_stages_of_a_study_and_how_many_networks_each_has():
    def plan(trials, **settings):
        rows = study_files.planned_stages(parse_study(settings), trials)
        return [(row["stage"], row["num_trials"], row["max_epochs"]) for row in rows]

    trials = [{"epochs": 8}, {"epochs": 4}, {"epochs": 8}]
    confirm, refit = {"top": 2, "folds": 2, "seeds": 2}, {"top": 1, "seeds": 3}
    assert plan(trials, confirm=confirm, refit=refit, finalize={"top": 2}) == [
        *(("search", 3, 8), ("confirm", 8, 8), ("refit", 3, 8), ("finalize", 8 + 3, 0))
    ]
    # What is trained on all classes is not tested; nor is there more to refit than was searched.
    everything = {"top": 5, "seeds": 2, "classes": "all", "epochs": 20}
    assert plan(trials, refit=everything, finalize={"top": 1}) == [
        *(("search", 3, 8), ("refit", 6, 20), ("finalize", 1, 0))
    ]
    # Without validation classes nothing is searched: each configuration is trained with each seed.
    unvalidated = [{"data": {"split": {"val_fraction": 0.0}}, **trial} for trial in trials]
    assert plan(unvalidated, refit=refit, finalize={"top": 1}) == [("refit", 9, 8), ("finalize", 9, 0)]


def test_a_sampler_that_cannot_show_all_development_classes_is_found_before_the_study_starts(tmp_path):
    # 5 development classes: 3 train in the search, in 2 batches of 2 classes; a refit trains on all 5.
    overrides = ["study.confirm=null", "study.refit={seeds: 2}"]
    words = r"a refit trains on 5 classes, and its sampler cannot: sampler\.batches_per_epoch = 2 .* give at least 3"
    with pytest.raises(StudyError, match=words):
        make(tmp_path, overrides=overrides)
    assert not (tmp_path / "studies").exists()
    folder = make(tmp_path, overrides=[*overrides, "trial.sampler.batches_per_epoch=3"])
    splits = json.loads((folder / "split.json").read_text())
    sizes = {name.split()[0]: [len(parts[part]) for part in ("train", "val", "test")] for name, parts in splits.items()}
    assert sizes == {"search": [3, 2, 5], "refit": [5, 0, 5]}


def test_images_of_a_trial_on_every_class_are_left_to_that_trial_which_records_the_read(tmp_path, caplog):
    caplog.set_level("INFO", "raydml")
    overrides = ["study.confirm=null", "study.refit={classes: all}", "trial.data.split.val_fraction=0"]
    overrides += ["trial.data.split.test_fraction=0", "trial.sampler.batches_per_epoch=5"]
    folder = make(tmp_path, overrides=overrides)
    assert not (folder / "test_reads.jsonl").exists()
    assert not (tmp_path / "studies" / "test_reads.jsonl").exists()
    assert "refits train on the sealed classes as well, and are never scored" in caplog.text
    (parts, _) = json.loads((folder / "split.json").read_text()).values()
    assert [len(parts[part]) for part in ("train", "val", "test")] == [10, 0, 0]


def test_every_trial_of_a_study_carries_the_hash_of_its_images(tmp_path):
    trials = json.loads((make(tmp_path) / "study.json").read_text())["trials"]
    assert len(trials) == 3
    assert len({trial["data"]["content"] for trial in trials}) == 1
    assert trials[0]["data"]["content"]


def test_the_split_is_recorded_by_class_name_and_is_disjoint(tmp_path):
    splits = json.loads((make(tmp_path) / "split.json").read_text())
    assert len(splits) == 3  # the search and two folds
    for parts in splits.values():
        assert parts["test"] == ["5", "6", "7", "8", "9"]
        assert sorted(parts["train"] + parts["val"]) == ["0", "1", "2", "3", "4"]


def test_an_unreadable_image_is_named_before_anything_starts(tmp_path):
    root = image_folder(tmp_path / "images")
    (root / "class0" / "0.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"0\.png"):
        make(tmp_path, text=SPACE % "image_folder", overrides=[f"machine.data_root={root}"])
    assert not (tmp_path / "studies" / "mini" / "study.json").exists()


def test_a_study_is_refused_while_its_pictures_are_exchanged_and_goes_on_when_they_are_back(tmp_path):
    """The two pictures have one size, so the listing is the same; a new study takes them as they are."""
    options = [f"machine.data_root={image_folder(tmp_path / 'images')}"]
    one, two = tmp_path / "images" / "class0" / "0.png", tmp_path / "images" / "class1" / "0.png"
    two.write_bytes(one.read_bytes()[:-4] + b"same")
    folder = make(tmp_path, text=SPACE % "image_folder", overrides=options)
    assert len(list((folder / "image_digests").iterdir())) == 1

    def exchange():
        contents = one.read_bytes(), two.read_bytes()
        two.write_bytes(contents[0])
        one.write_bytes(contents[1])

    def start():
        study = read_study(folder)
        return _refuse_other_images(folder, study, Machine.model_validate(study["machine"]))

    start()
    exchange()
    study = read_study(folder)
    with pytest.raises(DataError, match=r"2 of 16 images under .* since they were first decoded"):
        open_development(parse_trial(study["trials"][0]), Machine.model_validate(study["machine"]))
    for _ in range(2):
        with pytest.raises(DataError, match=r"2 of 16 images under .*class0/0\.png, class1/0\.png\. .*Cure: restore"):
            start()
    make(tmp_path, text=SPACE % "image_folder", overrides=[*options, "study.name=other"])
    with pytest.raises(DataError, match=r"2 of 16 images .*since the study first opened them"):
        start()
    exchange()
    start()
    two.rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"Missing: class1/0\.png\. Cure: restore"):
        start()
    (tmp_path / "elsewhere").rename(two)
    start()


def test_a_study_records_how_its_images_differ_from_the_published_ones(tmp_path, monkeypatch):
    root = build("cub200", tmp_path / "cub", classes_per_part=3, images_per_class=4)

    def recorded(name):
        (tmp_path / name).mkdir()
        overrides = [f"machine.data_root={root}", "machine.on_unreadable=skip", "study.confirm=null"]
        overrides += ["study.refit={seeds: 1}", "study.search={scheduler: none, num_trials: 1}"]
        overrides += ["trial.data.split={val_fraction: 0}", "trial.sampler.images_per_class=2"]
        folder = make(tmp_path / name, text=SPACE % "cub200", overrides=overrides)
        study = json.loads((folder / "study.json").read_text())
        return study["unlike_published"], study["specification"]

    found, specification = recorded("fragment")
    assert found == [
        "train has 12 images of 3 classes, published are 5,864 of 100",
        "test has 12 images of 3 classes, published are 5,924 of 100",
    ]
    # Were these the published counts, the same study, with the same specification, would have nothing to record.
    counts = {"train": PublishedCount(12, 3, False), "test": PublishedCount(12, 3, False)}
    monkeypatch.setitem(BENCHMARKS, "cub200", replace(BENCHMARKS["cub200"], counts=counts))
    assert recorded("whole") == ([], specification)
    sorted(root.glob("images/*/*.jpg"))[0].write_bytes(b"no image")  # of a training class
    assert recorded("unreadable")[0] == ["1 development image that cannot be read is left out"]


def test_batches_that_cannot_show_all_classes_are_refused_before_anything_starts(tmp_path):
    with pytest.raises(DataError, match=r"batches_per_epoch = 1 cannot show all 3 classes"):
        make(tmp_path, overrides=["trial.sampler.batches_per_epoch=1"])


def test_a_study_keeps_what_was_cut_and_is_the_same_study_again(tmp_path):
    overrides = ["trial.sampler.classes_per_batch=16"]
    folder = make(tmp_path, overrides=overrides)
    trials = json.loads((folder / "study.json").read_text())["trials"]
    # The folds of digits 0 to 4 train on 2 or 3 classes.
    assert {trial["sampler"]["classes_per_batch"] for trial in trials} == {2}
    before = (folder / "study.json").read_bytes()
    assert make(tmp_path, overrides=overrides) == folder
    assert (folder / "study.json").read_bytes() == before


def test_a_k_beyond_the_validation_images_is_refused_before_anything_starts(tmp_path):
    with pytest.raises(StudyError, match="recall_at"):
        make(tmp_path, overrides=["trial.recall_at=[1, 5000]"])


def listed_space(root):
    """8 classes of 4 images: 3 train, 3 validate, 2 are tested. Those scored have 1 query and 3 gallery images.

    In the column `camera`, 3 images of a class are by camera 0 and 1 by camera 1; in the column `one`, all by one."""
    rows = []
    for number in range(8):
        part = "train" if number < 3 else "val" if number < 6 else "test"
        for image in range(4):
            write_image(root / f"{number}{image}.png", shade=10 * number + image)
            role = "" if part == "train" else "query" if image == 0 else "gallery"
            rows.append([f"{number}{image}.png", f"class{number}", part, role, str(int(image == 3)), "0"])
    header = ("path", "label", "split", "role", "camera", "one")
    write_list(root, rows, header)
    (root / "list.csv").rename(root / "roles.csv")
    write_list(root, [row[:3] + row[4:] for row in rows], header[:3] + header[4:])
    return (SPACE % "image_list") + f"machine: {{data_root: {json.dumps(str(root))}}}\n"


@pytest.mark.parametrize(
    ("settings", "largest"),
    [
        (["trial.data.list_file=list.csv"], 7),  # the others of 2 x 4
        (["trial.data.list_file=roles.csv"], 6),  # the gallery
        (["trial.data.list_file=list.csv", "trial.data.group=camera", "trial.data.exclude_same=group"], 5),  # without 3
    ],
)
def test_a_k_beyond_the_test_images_is_refused_before_anything_starts(tmp_path, settings, largest):
    text = listed_space(tmp_path / "images")

    def plan(k, *more):
        return plan_study(space_at(tmp_path, text, [*settings, *more, f"trial.recall_at=[1, {k}]"]))

    assert len(plan(largest, "study.finalize={top: 1}").trials) == 3
    plan(largest + 1)  # nothing is tested
    with pytest.raises(StudyError) as error:
        plan(largest + 1, "study.finalize={top: 1}")
    assert f"trial.recall_at = [1, {largest + 1}]: the test classes have 8 images" in str(error.value)
    assert f"a query finds only {largest} images" in str(error.value)
    assert "Cure: leave the larger k out, or raise trial.data.split.test_fraction" in str(error.value)


@pytest.mark.parametrize(("list_file", "expected"), [("list.csv", (1, 2, 4)), ("roles.csv", (1, 2))])
def test_the_default_k_are_cut_to_what_a_query_finds(tmp_path, list_file, expected):
    """Two test classes of 3 images, or of a query and a gallery image: a query finds 5 others, or a gallery of 2."""
    text = listed_space(tmp_path / "images").replace("  recall_at: [1]\n", "")
    for name in ("list.csv", "roles.csv"):
        lines = (tmp_path / "images" / name).read_text().splitlines()
        dropped = ("63.png", "73.png", *(("62.png", "72.png") if name == "roles.csv" else ()))
        (tmp_path / "images" / name).write_text("\n".join(line for line in lines if not line.startswith(dropped)))
    settings = [f"trial.data.list_file={list_file}", "study.finalize={top: 1}"]
    assert {trial.recall_at for trial in plan_study(space_at(tmp_path, text, settings)).trials} == {expected}


def test_an_extra_test_that_cannot_be_scored_is_refused_before_anything_starts(tmp_path):
    text = listed_space(tmp_path / "images")

    def plan(column):
        extra = f"{{name: shop, data: image_list, list_file: list.csv, group: {column}, exclude_same: group}}"
        more = ["trial.data.list_file=list.csv", "study.finalize={top: 1}", f"trial.data.extra_tests=[{extra}]"]
        return plan_study(space_at(tmp_path, text, more))

    assert len(plan("camera").trials) == 3
    with pytest.raises(DataError, match=r"extra_tests: shop: .* in another group to find. Cure: .* exclude_same"):
        plan("one")


def test_trials_that_select_on_different_metrics_are_refused(tmp_path):
    with pytest.raises(StudyError, match="select_on"):
        make(tmp_path, overrides=["trial.select_on={grid: [val_map_at_r, val_recall_at_1]}"])


def test_a_study_is_found_by_name_and_by_path_and_a_misspelt_one_gets_the_nearest(tmp_path):
    folder = make(tmp_path)
    assert find_study("mini", tmp_path / "studies") == folder
    assert find_study(str(folder), tmp_path) == folder
    with pytest.raises(StudyError, match="did you mean 'mini'"):
        find_study("mimi", tmp_path / "studies")


def test_confirmation_is_the_best_configurations_times_folds_times_seeds(tmp_path):
    space = space_at(tmp_path)
    trials = {
        f"search-{i:03d}": trial
        for i, trial in enumerate(study_files.fingerprinted_trials(space, Catalogs(space.machine)))
    }
    settings = parse_study({"seed": 5, "confirm": {"top": 2, "folds": 2, "seeds": 2}})
    ranking = [
        {"trial": "search-002", "fingerprint": "c", "value": 0.9},
        {"trial": "search-000", "fingerprint": "a", "value": 0.5},
        {"trial": "search-001", "fingerprint": "b", "value": None},
    ]
    rows = confirm_trials(ranking, trials, settings)
    assert [(r["from_trial"], r["trial"].data.split.fold, r["trial"].seed) for r in rows] == [
        (key, fold, seed) for key in ("search-002", "search-000") for fold in (0, 1) for seed in (5, 6)
    ]
    assert rows[0]["trial"].optimizer == trials["search-002"].optimizer


def test_a_study_is_read_with_the_paths_of_where_its_storage_is_now(tmp_path):
    recorded, here = "/recorded/studies", tmp_path / "here"
    machine = {"data_root": f"{recorded}/images", "cache_dir": f"{recorded}/cache", "device": "cpu"}
    facts = {"name": "mini", "storage": recorded, "machine": machine}
    (here / "mini").mkdir(parents=True)

    def read(**changes):
        (here / "mini" / "study.json").write_text(json.dumps({**facts, **changes}))
        return study_files.read_study(here / "mini")

    found = read(tracking_uri=f"sqlite:///{recorded}/mlflow.db")
    assert found["tracking_uri"] is None, "the store in the storage folder"
    assert found["storage"] == str(here)
    assert found["machine"] == {"data_root": f"{here}/images", "cache_dir": f"{here}/cache", "device": "cpu"}
    assert read(tracking_uri=None)["tracking_uri"] is None
    for elsewhere in ("http://host:5000", f"sqlite:///{recorded}/other.db", "sqlite:////shared/mlflow.db"):
        assert read(tracking_uri=elsewhere)["tracking_uri"] == elsewhere
    outside = read(tracking_uri=None, machine={"data_root": "/data", "cache_dir": None})
    assert outside["machine"] == {"data_root": "/data", "cache_dir": None}
    study_files.report_to(here / "mini", f"sqlite:///{here}/mlflow.db")
    assert study_files.read_json(here / "mini" / "study.json")["tracking_uri"] is None
    study_files.report_to(here / "mini", "http://host:5000")
    assert study_files.read_study(here / "mini")["tracking_uri"] == "http://host:5000"


@pytest.mark.parametrize(
    ("name", "cure"),
    [
        ("study.json", "put it back from a backup, or delete it and make it again: launch.py sweep"),
        ("split.json", "the study works without it"),
        ("summary.json", "launch.py report"),
        ("ranking.json", "delete it and let the study make it again: launch.py resume"),
        ("final/refit-000.json", "delete it and let the study make it again: launch.py resume"),
    ],
)
def test_a_damaged_file_of_a_study_is_named_with_its_cure(tmp_path, name, cure):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    (tmp_path / "resolved_space.json").write_text("{}")
    whole = json.dumps([{"trial": "ü"}] if name == "ranking.json" else {"name": "ü", "study": {}}).encode()
    others = [b"", b"null", b"3", b"[3]", b"[" * 100_000, b"1" * 5000, b"\xff" + whole, b"\0" * 100]
    for content in (*others, *(whole[:size] for size in range(len(whole))), b"{}" if name == "ranking.json" else b"[]"):
        file.write_bytes(content)
        with pytest.raises(StudyError) as caught:
            study_files.read_json(file)
        assert f"{file} is damaged: " in str(caught.value)
        assert cure in str(caught.value)


def test_a_key_that_a_file_of_a_study_lacks_is_an_error_that_names_the_file(tmp_path):
    file = tmp_path / "confirmed.json"
    file.write_text('[{"configuration": "a", "runs": [{"trial": "confirm-000"}]}]')
    (row,) = study_files.read_json(file)
    assert pickle.loads(pickle.dumps(row)) == {"configuration": "a", "runs": [{"trial": "confirm-000"}]}
    assert (row.get("mean"), row["runs"][0]["trial"]) == (None, "confirm-000")
    for lacking, key in ((row, "from_trial"), (row["runs"][0], "value")):
        with pytest.raises(StudyError, match=rf"confirmed\.json is damaged: it has no {key}\. Cure: delete it"):
            lacking[key]


def test_a_study_whose_study_json_is_lost_is_named_with_its_cure(tmp_path):
    folder = make(tmp_path)
    events.append(folder / "events.jsonl", {"event": "study_started", "study": "mini", "config": {}})
    assert study_files.lost_specification(folder) == ""
    (folder / "study.json").unlink()
    again = f"Cure: put it back from a backup, or make it again: launch.py sweep {folder}/resolved_space.json --storage"
    for target, storage in (("mini", folder.parent), (str(folder), tmp_path)):
        with pytest.raises(StudyError, match=r"study\.json is missing") as caught:
            find_study(target, storage)
        assert again in str(caught.value)
    with pytest.raises(StudyError, match="There are none yet"):
        find_study("other", folder.parent)
    assert study_files.lost_specification(tmp_path) == "", "no study was here"


def test_a_study_whose_study_json_was_deleted_is_made_again_and_keeps_its_id(tmp_path):
    folder = make(tmp_path)
    made = json.loads((folder / "study.json").read_text())
    for event in ({"event": "study_started", "study": "mini", "study_id": made["study_id"]}, started_with(made, 0)):
        events.append(events.events_path(folder), event)
    (folder / "study.json").write_bytes((folder / "study.json").read_bytes()[:2000])
    with pytest.raises(StudyError, match=r"study\.json is damaged"):
        make(tmp_path)
    (folder / "study.json").unlink()
    space = load_space(folder / "resolved_space.json")
    create_study(space, storage=tmp_path / "studies", tracking_uri="sqlite:///x.db", space_text="text")
    again = json.loads((folder / "study.json").read_text())
    assert {**again, "created": ""} == {**made, "created": ""}
    (folder / "study.json").unlink()
    with pytest.raises(
        StudyError, match=r"events\.jsonl is of other trials than those of 'mini'\. Cure: .*--name mini-2"
    ):
        make(tmp_path, overrides=["trial.epochs=3"])


def started_with(study, number):
    trial = parse_trial(study["trials"][number])
    event = {"event": "trial_started", "stage": "search", "trial": f"search-{number:03d}"}
    return {**event, "fingerprint": fingerprint(trial), "config": study["trials"][number]}


def test_a_study_that_is_to_run_has_the_settings_and_trials_that_it_was_made_with(tmp_path):
    folder = make(tmp_path)
    made = study_files.read_study(folder)
    study, machine = study_files.settings_of(folder, made)
    assert (study.search.num_trials, machine.data_root) == (3, None)
    text = (folder / "study.json").read_text()
    for whole, damaged in (
        ('"epochs": 2', '"epochs": 3'),
        ('"num_trials": 3', '"num_trials": 2'),
        ('"device": "', '"device": "x'),
    ):
        assert whole in text
        (folder / "study.json").write_text(text.replace(whole, damaged, 1))
        with pytest.raises(
            StudyError, match=r"study\.json is damaged: .*Cure: put it back from a backup, or delete it"
        ):
            study_files.settings_of(folder, study_files.read_study(folder))


def test_an_extra_test_is_checked_before_the_study_and_noted_where_nothing_scores_it(tmp_path, caplog):
    folder_of(tmp_path / "own", **dict.fromkeys("abcdefgh", 4))
    folder_of(tmp_path / "street", x=1, y=1)
    sets = [{"name": "street", "data": "image_folder", "root": str(tmp_path / "street")}]
    own = ["trial.data.name=image_folder", f"machine.data_root={tmp_path / 'own'}"]
    own += [f"trial.data.extra_tests={json.dumps(sets)}"]
    with pytest.raises(DataError, match=r"data\.extra_tests: street: .* no query has another image of its class"):
        make(tmp_path, overrides=[*own, "study.finalize={top: 1}"])
    assert not (tmp_path / "studies" / "mini").exists()
    make(tmp_path, overrides=own)
    assert "data.extra_tests are not scored, because study.finalize is null" in caplog.text
