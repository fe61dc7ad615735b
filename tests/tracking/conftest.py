"""A database with MLflow's tables, which take seconds to make."""

import shutil
import sqlite3
from pathlib import Path

import pytest

from raydml.tracking.store import default_uri, prepare_store


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with its tables and nothing in them."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    prepare_store(f"sqlite:///{path}")
    database = sqlite3.connect(path)
    database.execute("delete from experiment_tags")
    database.execute("delete from experiments where name = 'raydml'")
    database.commit()
    database.close()
    return path


@pytest.fixture
def storage(tmp_path: Path, empty_store: Path) -> Path:
    """A storage folder with a store of its own."""
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return tmp_path


@pytest.fixture
def uri(storage: Path) -> str:
    """The address of the store in `storage`."""
    return default_uri(storage)
