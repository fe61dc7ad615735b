"""The door that exported models and registered MLflow models import; it stays where it is."""

from raydml.inference.export import EmbeddingModel, ExportError

__all__ = ["EmbeddingModel", "ExportError"]
