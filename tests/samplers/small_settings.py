"""Settings of any sampler for a few images."""

from raydml import registry

SETTINGS = {"batch_size": 12, "classes_per_batch": 3, "images_per_class": 4, "batches_per_epoch": 9}


def small_settings(name: str) -> dict[str, int]:
    """Return those of SETTINGS that the sampler of this name has: batches of 12 images, 3 classes of 4 each."""
    fields = registry.settings_model("samplers", name).model_fields
    return {key: value for key, value in SETTINGS.items() if key in fields}
