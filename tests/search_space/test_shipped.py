"""The search spaces that come with raydml, and the one for a folder of images."""

from pathlib import Path

import pytest

from raydml.cli.studies import space_of
from raydml.search_space import shipped
from raydml.search_space.shipped import find_space, overrides_for_folder, shipped_spaces
from raydml.search_space.space import load_space, sample_trials

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["image_folder", "image_folder.yaml", "search_spaces/image_folder.yaml"])
def test_a_shipped_space_is_found_from_any_folder(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert find_space(Path(name)) == ROOT / "search_spaces" / "image_folder.yaml"
    assert find_space(Path("elsewhere") / "image_folder.yaml") is None
    assert find_space(Path("nothing")) is None
    (tmp_path / "image_folder").write_text("")
    assert find_space(Path("image_folder")) == Path("image_folder")  # a file of the user comes first


def test_an_installed_package_has_the_spaces_inside(tmp_path, monkeypatch):
    (tmp_path / "raydml" / "search_spaces").mkdir(parents=True)
    (tmp_path / "raydml" / "search_spaces" / "mine.yaml").write_text("")
    monkeypatch.setattr(shipped, "_PACKAGE", tmp_path / "raydml")
    assert [path.name for path in shipped_spaces()] == ["mine.yaml"]


def test_a_folder_is_the_space_image_folder_with_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Kleider (neu)" / "a").mkdir(parents=True)
    path, overrides = space_of(Path("Kleider (neu)"), None)
    space = load_space(path, overrides)
    assert (space.study.name, space.machine.data_root) == ("Kleider--neu-", Path("Kleider (neu)"))
    assert load_space(path, [*overrides, "study.name=clothes"]).study.name == "clothes"  # --set and --name win
    with pytest.raises(ValueError, match="Cure: leave out one"):
        space_of(Path("Kleider (neu)"), Path("other"))


def test_a_list_in_the_folder_decides_on_the_classes(tmp_path):
    (tmp_path / "list.csv").write_text("path;label\na.jpg;a\n")
    (tmp_path / "prices.csv").write_text("article,price\n")
    found = dict(override.split("=", 1) for override in overrides_for_folder(tmp_path))
    assert (found["trial.data.name"], found["trial.data.list_file"]) == ('"image_list"', '"list.csv"')
    space = load_space(ROOT / "search_spaces" / "image_folder.yaml", overrides_for_folder(tmp_path))
    assert space.machine.data_root == tmp_path


def test_of_several_lists_none_is_chosen_in_silence(tmp_path, caplog):
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text("path,label\n")
    assert not any("image_list" in override for override in overrides_for_folder(tmp_path))
    assert "2 lists of images (a.csv, b.csv), and none is used" in caplog.text
    assert "--set trial.data.list_file=a.csv" in caplog.text


def test_a_wrong_name_gets_the_nearest_and_the_cure():
    with pytest.raises(ValueError, match=r"did you mean 'image_folder'\?.*Cure: .*list spaces"):
        space_of(Path("search_spaces/image_foldr.yaml"), None)


def test_a_list_is_the_space_image_folder_of_its_folder(tmp_path):
    list_file = tmp_path / "my list.csv"
    list_file.write_text("path;label\na/0.jpg;a\n", encoding="utf-8")
    space = load_space(ROOT / "search_spaces" / "image_folder.yaml", overrides_for_folder(list_file))
    assert (space.study.name, space.machine.data_root) == ("my-list", tmp_path)
    data = sample_trials(space)[0].data
    assert (data.name, data.list_file) == ("image_list", "my list.csv")
