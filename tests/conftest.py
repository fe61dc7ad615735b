"""The environment the commands run in: set before any test imports Ray or MLflow."""

from raydml.cli.main import prepare_environment

prepare_environment()
