"""What is sent for a job: the code of a checkout or of an installation, a space from elsewhere, and nothing else."""

import io
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from raydml.search_space import shipped
from raydml.study import job_files, package
from raydml.study.job_files import archive_of, files_of_job
from tests.study.test_folder import ROOT


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A small checkout whose package is the one that would be sent."""
    root = tmp_path / "checkout"
    for name in ("raydml/__init__.py", "raydml/losses/margin.py", "launch.py", "search_spaces/digits.yaml",
                 "studies/digits/study.json", "tests/test_x.py", "raydml/.gitignore"):  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    for module in (job_files, package):
        monkeypatch.setattr(module, "PACKAGE", root / "raydml")
    monkeypatch.setattr(shipped, "_PACKAGE", root / "raydml")
    monkeypatch.setattr(job_files, "git_commit", lambda: "0123456789abcdef-dirty")
    return root


def track(root, *names):
    for words in (["init", "-q"], ["add", *names]):
        subprocess.run(["git", "-C", str(root), *words], check=True)


def test_of_a_checkout_goes_what_git_tracks_and_small_new_code(checkout):
    track(checkout, "raydml/__init__.py", "raydml/losses/margin.py", "launch.py", "search_spaces", "studies", "tests")
    (checkout / "raydml" / ".gitignore").write_text("*.log\n")
    (checkout / "raydml" / "losses" / "mine.py").write_text("class Mine: ...")
    (checkout / "raydml" / "train.log").write_text("ignored")
    (checkout / "raydml" / "weights.bin").write_bytes(bytes((1 << 20) + 1))
    (checkout / "raydml" / "losses" / "margin.py").write_text("as it is now, not as it was added")
    found = files_of_job(checkout / "search_spaces" / "digits.yaml")
    assert set(found.contents) == {
        "raydml/__init__.py", "raydml/losses/margin.py", "raydml/losses/mine.py", "raydml/.gitignore", "launch.py",
        "search_spaces/digits.yaml", "raydml/commit.txt",
    }  # fmt: skip
    assert found.contents["raydml/losses/margin.py"] == b"as it is now, not as it was added"
    assert found.contents["raydml/commit.txt"] == b"0123456789abcdef-dirty\n"
    assert found.left_out == ("raydml/weights.bin",)
    assert found.space == "search_spaces/digits.yaml"
    assert found.has_launch


def test_without_git_goes_the_package_with_launch_and_the_spaces(checkout):
    (checkout / "raydml" / "__pycache__").mkdir()
    (checkout / "raydml" / "__pycache__" / "x.pyc").write_text("x")
    found = files_of_job(checkout / "search_spaces" / "digits.yaml")
    assert set(found.contents) == {
        "raydml/__init__.py", "raydml/losses/margin.py", "launch.py", "search_spaces/digits.yaml", "raydml/commit.txt"
    }  # fmt: skip


def test_a_package_without_a_checkout_goes_with_its_own_spaces_and_is_started_as_a_module(checkout):
    shutil.move(checkout / "search_spaces", checkout / "raydml" / "search_spaces")
    (checkout / "launch.py").unlink()
    found = files_of_job(checkout / "raydml" / "search_spaces" / "digits.yaml")
    assert found.space == "raydml/search_spaces/digits.yaml"
    assert not found.has_launch
    assert "studies/digits/study.json" not in found.contents


@pytest.mark.usefixtures("checkout")
def test_a_space_from_elsewhere_goes_along_under_its_own_name(tmp_path):
    space = tmp_path / "my space.yaml"
    space.write_text("trial: {}")
    found = files_of_job(space)
    assert found.space == "submitted/my space.yaml"
    assert found.contents["submitted/my space.yaml"] == b"trial: {}"


@pytest.mark.usefixtures("checkout")
def test_a_file_of_points_goes_along(tmp_path):
    for folder in ("spaces", "points"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "margin.yaml").write_text(folder)
    found = files_of_job(tmp_path / "spaces" / "margin.yaml", tmp_path / "points" / "margin.yaml")
    assert found.contents[found.space] == b"spaces"
    assert found.contents[found.points] == b"points", "two files of one name"
    assert files_of_job(tmp_path / "spaces" / "margin.yaml").points == ""


def test_the_archive_follows_from_the_files_alone():
    name, archive = archive_of({"b": b"2", "a/c": b"1"})
    assert archive_of({"a/c": b"1", "b": b"2"}) == (name, archive)
    assert len({name, archive_of({"b": b"2", "a/c": b"3"})[0], archive_of({"b": b"2", "a/d": b"1"})[0]}) == 3
    assert name.startswith("_ray_pkg_")
    assert name.endswith(".zip")
    with zipfile.ZipFile(io.BytesIO(archive)) as reader:
        assert {entry: reader.read(entry) for entry in reader.namelist()} == {"a/c": b"1", "b": b"2"}
        assert {entry.external_attr >> 16 for entry in reader.infolist()} == {0o644}


def test_what_is_sent_runs_by_itself_and_knows_its_commit(tmp_path):
    """In a folder that has nothing else, as the head of a cluster unpacks it."""
    found = files_of_job(ROOT / "search_spaces" / "digits.yaml")
    with zipfile.ZipFile(io.BytesIO(archive_of(found.contents)[1])) as reader:
        reader.extractall(tmp_path)
    program = (
        "import sys, raydml; from raydml.training.checkpoint import git_commit\n"
        "from raydml.study.package import digest_of_package\n"
        "print(raydml.__file__, digest_of_package(), git_commit())"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    file = str(tmp_path / "raydml" / "__init__.py")
    assert done.stdout.split() == [file, package.digest_of_package(), str(package.git_commit())]
    assert not [name for name in found.contents if name.startswith(("tests/", "studies/", "docs/", ".venv/"))]
    assert Path(tmp_path / "launch.py").is_file()
    assert sum(map(len, found.contents.values())) < 10e6
