"""Retrieval by the definition, one query at a time: what the fast scores are held against."""

import numpy as np
import torch


def slow_recall_and_map(embeddings, labels):
    """Recall@1 and MAP@R in leave-one-out of embeddings (N, D), a tensor, of labels (N,); equals in order of index."""
    distance = torch.cdist(embeddings.double(), embeddings.double())
    distance.fill_diagonal_(torch.inf)
    labels = torch.from_numpy(labels)
    recalls, averages = [], []
    for query in range(len(labels)):
        right = (labels[distance[query].argsort(stable=True)] == labels[query])[:-1]
        relevant = int(right.sum())
        hits = right[:relevant].double()
        averages.append(float((hits.cumsum(0) / torch.arange(1, relevant + 1) * hits).sum() / relevant))
        recalls.append(float(right[0]))
    return np.mean(recalls), np.mean(averages)
