"""The package as other machines get it."""

import os
import subprocess
import sys

from raydml.study import package


def written(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


def test_the_digest_of_the_package_changes_with_each_byte_and_each_name(tmp_path, monkeypatch):
    def digest(**files):
        folder = tmp_path / f"copy-{len(list(tmp_path.iterdir()))}" / "raydml"
        named = {name.replace("__", "/"): content for name, content in files.items()}
        monkeypatch.setattr(package, "PACKAGE", written(folder, named))
        package.digest_of_package.cache_clear()
        return package.digest_of_package()

    try:
        same = digest(a="1", b__c="2")
        assert digest(a="1", b__c="2") == same
        others = {digest(a="1", b__c="3"), digest(a="1", b__d="2"), digest(a="12"), digest(a="1", b__c="2", d="")}
        assert len(others | {same}) == 5
        beside = {"__pycache__/a.cpython-311.pyc.139872": "x", "b/.c.swp": "x", "a~": "x"}
        monkeypatch.setattr(package, "PACKAGE", written(tmp_path / "with more", {"a": "1", "b/c": "2", **beside}))
        package.digest_of_package.cache_clear()
        assert package.digest_of_package() == same
    finally:
        package.digest_of_package.cache_clear()


def test_the_staged_package_is_the_package_with_its_commit_and_nothing_else():
    names = "package.__file__, package.digest_of_package(), package.git_commit()"
    command = [sys.executable, "-c", f"from raydml.study import package; print({names})"]
    with package.staged_package() as folder:
        assert [path.name for path in folder.iterdir()] == ["raydml"]
        environment = {**os.environ, "PYTHONPATH": str(folder)}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
        file = str(folder / "raydml" / "study" / "package.py")
        assert done.stdout.split() == [file, package.digest_of_package(), str(package.git_commit())]
    assert not folder.exists()
