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


def slow_scores(embeddings, labels, queries, gallery, is_ignored, recall_at=(1, 2, 5)):
    """Metrics of queries (rows) against a gallery (rows), one pair at a time, and the number of queries without any
    image to find, which are left out of the means.

    is_ignored: a function of a query row and a gallery row; the query itself is always ignored.
    """
    found = {name: [] for name in (*(f"recall_at_{k}" for k in recall_at), "r_precision", "map_at_r", "mrr", "map")}
    num_lone = 0
    for query in queries:
        distances = []
        for place, row in enumerate(gallery):
            if row == query or is_ignored(query, row):
                continue
            total = sum((float(a) - float(b)) ** 2 for a, b in zip(embeddings[query], embeddings[row], strict=True))
            distances.append((total, place, labels[row] == labels[query]))
        hits = [hit for _, _, hit in sorted(distances)]
        num_relevant = sum(hits)
        if not num_relevant:
            num_lone += 1
            continue
        precisions = [(rank, sum(hits[:rank]) / rank) for rank, hit in enumerate(hits, start=1) if hit]
        for k in recall_at:
            found[f"recall_at_{k}"].append(any(hits[:k]))
        found["r_precision"].append(sum(hits[:num_relevant]) / num_relevant)
        found["map_at_r"].append(sum(value for rank, value in precisions if rank <= num_relevant) / num_relevant)
        found["mrr"].append(1 / precisions[0][0])
        found["map"].append(sum(value for _, value in precisions) / num_relevant)
    return {name: float(np.mean(values)) for name, values in found.items()}, num_lone
