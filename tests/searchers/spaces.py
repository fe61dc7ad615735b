"""A small space with every kind of domain, nested choices and shared keys, and searchers over it."""

from raydml.search_space.space import load_space

TEXT = """
study: {name: spaces, search: {num_trials: 40}}
trial:
  epochs: 9
  data: {name: digits, resize_px: 16, crop_px: 16}
  model: {backbone: convnet, weights: none, embedding_dim: {choice: [16, 32, 64]}}
  loss, miner:
    choice:
      - {loss: {name: margin, beta: {uniform: [0.6, 1.4]}, nu: {choice: [0.0, 0.1]}}, miner: {name: distance_weighted}}
      - {loss: {name: triplet, margin: {quniform: [0.1, 0.5, 0.1]}}, miner: {name: all, tuples: triplets}}
      - loss: {name: multi_similarity, alpha: {loguniform: [0.01, 20]}}
        miner: {choice: [{name: multi_similarity, epsilon: {uniform: [0.05, 0.8]}}, null]}
  sampler: {name: class_balanced, classes_per_batch: 2, images_per_class: {randint: [4, 9]}}
  optimizer: {name: adamw, learning_rate: {loguniform: [1.0e-5, 1.0e-2]}}
"""


def space_at(folder, *overrides, text=TEXT):
    path = folder / "space.yaml"
    path.write_text(text)
    return load_space(path, overrides)


def with_searcher(folder, name, *overrides, text=TEXT):
    return space_at(folder, f"study.search.searcher={{name: {name}}}", *overrides, text=text)
