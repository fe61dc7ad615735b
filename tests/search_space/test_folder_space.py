"""A search space written for a folder: it loads, fits the images as it is, and is never written over another file."""

import os
from pathlib import Path

import pytest
from PIL import Image

from raydml.search_space.folder_space import look_at_folder, space_text
from raydml.search_space.space import load_space, sample_trials
from raydml.study.limits import trials_within_limits
from raydml.training.trial_images import Catalogs
from tests.cli.commands import done, refused


def make_folder(root, num_classes, per_class, size=(90, 70), csv=False):
    lines = ["path,label"]
    for label in range(num_classes):
        folder = root / (f"class{label}" if not csv else "all")
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(per_class):
            file = folder / f"{label}-{number}.png"
            Image.new("RGB", size, (label * 8, number * 20, 99)).save(file)
            lines.append(f"{file.relative_to(root)},{label}")
    if csv:
        (root / "labels.csv").write_text("\n".join(lines))
    return root


@pytest.mark.parametrize("has_gpu", [False, True])
@pytest.mark.parametrize(
    ("num_classes", "per_class", "size", "csv"),
    [(6, 2, (20, 33), False), (12, 5, (200, 300), True), (44, 4, (120, 100), False)],
)
def test_the_space_loads_and_its_images_need_no_cuts(tmp_path, caplog, num_classes, per_class, size, csv, has_gpu):
    root = make_folder(tmp_path / "my images", num_classes, per_class, size, csv)
    facts = look_at_folder(root)
    (tmp_path / "space.yaml").write_text(space_text(facts, has_gpu=has_gpu))
    space = load_space(tmp_path / "space.yaml")
    trials = sample_trials(space)
    assert (space.study.name, space.machine.data_root) == ("my-images", root)
    with caplog.at_level("INFO", "raydml"):
        assert trials_within_limits(trials, Catalogs(space.machine), space.study.confirm.folds) == trials
    assert "cut" not in caplog.text
    assert {trial.data.name for trial in trials} == {"image_list" if csv else "image_folder"}
    large = has_gpu and min(size) >= 96
    assert {trial.model.backbone for trial in trials} == {"resnet18" if large else "convnet"}
    # 20 px: as they are, in eights; 100 px and a GPU: half of 256; 200 px: what the weights were trained for.
    expected = {(20, False): 16, (20, True): 16, (100, True): 128, (200, True): 256}.get((min(size), has_gpu), 64)
    assert {trial.data.resize_px for trial in trials} == {expected}


def test_the_facts_of_a_folder_by_hand(tmp_path):
    facts = look_at_folder(make_folder(tmp_path, 10, 3))
    # 5 of 10 classes are sealed; 2 of the 5 others validate. 5 classes in 3 folds are 2, 2 and 1; two folds are used.
    assert (facts.parts, facts.num_folds) == ((3, 2, 5), 3)
    assert (facts.num_train_classes, facts.num_train_images, facts.num_scored) == (3, 9, 6)
    assert (facts.sides_px, facts.images_per_class) == ((70, 70, 70), (3, 3, 3))


def test_init_says_the_split_and_overwrites_nothing(tmp_path, monkeypatch):
    make_folder(tmp_path / "birds", 8, 2)
    monkeypatch.chdir(tmp_path)
    result = done("init", "birds")
    assert "8 classes in class folders, 16 images: 2 train / 2 validate / 4 test, sealed" in result.output
    assert "sweep birds.yaml --dry-run" in result.output
    before = Path("birds.yaml").read_text()
    assert "birds.yaml exists and is not overwritten. Cure: --output" in refused("init", "birds")
    assert Path("birds.yaml").read_text() == before
    assert "no such folder" in refused("init", "bird")
    assert "8 classes in class folders" in done("sweep", "birds.yaml", "--dry-run").output


def test_a_folder_whose_name_is_not_utf_8_or_has_line_breaks(tmp_path, monkeypatch):
    name = os.fsdecode(b"caf\xe9\n\xc2\x85:\xf0\x9f\x90\xa6")  # Windows-1252, two line breaks of YAML, a bird
    make_folder(tmp_path / name, 8, 2)
    monkeypatch.chdir(tmp_path)
    done("init", name, "--output", "space.yaml")
    assert f"#   {tmp_path}/café  :🐦\n" in Path("space.yaml").read_text(encoding="utf-8")
    assert load_space(Path("space.yaml")).machine.data_root == tmp_path / name
