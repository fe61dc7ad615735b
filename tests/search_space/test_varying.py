"""The keys that vary, with their domains in words."""

from raydml.search_space.space import load_space
from raydml.search_space.varying import varying_keys

SPACE = """\
trial:
  epochs: {randint: [3, 9]}
  data: {name: digits, resize_px: 16, crop_px: 16}
  model: {backbone: convnet, weights: none, embedding_dim: {quniform: [16, 64, 16]}}
  loss, miner, sampler:
    choice:
      - loss: {name: margin, beta: {uniform: [0.6, 1.2]}, nu: 0.0}
        miner: {choice: [null, {name: distance_weighted, cutoff: {choice: [0.4, 0.5]}}]}
        sampler: {name: class_balanced, classes_per_batch: 2, images_per_class: 8}
      - loss: {name: multi_similarity, beta: {choice: [20.0, 40.0]}}
        sampler: {name: class_balanced, classes_per_batch: 2, images_per_class: 4}
  optimizer: {name: adamw, learning_rate: {loguniform: [1e-5, 3e-4]}, weight_decay: 1e-4}
"""


def test_each_key_that_varies_has_its_domain_in_words(tmp_path):
    (tmp_path / "space.yaml").write_text(SPACE)
    assert varying_keys(load_space(tmp_path / "space.yaml").trial) == {
        "epochs": "randint 3 to 8",
        "model.embedding_dim": "quniform 16 to 64 in steps of 16",
        "loss.name": "set by block",
        "loss.beta": "uniform 0.6 to 1.2 or choice 20, 40",
        "miner.name": "set by block",
        "miner.cutoff": "choice 0.4, 0.5",
        "sampler.images_per_class": "set by block",
        "optimizer.learning_rate": "loguniform 1e-5 to 3e-4",
    }
