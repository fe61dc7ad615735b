"""What the tests of the commands share: a folder of their own, and no store from outside."""

import pytest


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    """Run a test in a folder of its own; the environment names no MLflow store."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
