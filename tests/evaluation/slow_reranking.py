"""k-reciprocal re-ranking and query expansion by their papers, one image at a time in float64, without a fast step."""

import math

import numpy as np


def squared(a, b):
    return math.fsum((float(x) - float(y)) ** 2 for x, y in zip(a, b, strict=True))


def slow_k_reciprocal(images, queries, gallery, k1, k2, weight):
    """Return the distances (len(queries), len(gallery)) of images (N, D), from numbers of queries and gallery images.

    Sets and dictionaries, as the paper writes it: R(p, k) are those of the k nearest of p that have p among their own
    k nearest; R*(p, k) adds R(q, k/2) of each q in R(p, k) of which more than two thirds are in R(p, k).
    """
    everyone = range(len(images))
    plain = [[squared(images[i], images[j]) for j in everyone] for i in everyone]
    scaled = [[value / (max(row) or 1.0) for value in row] for row in plain]

    def nearest(p, k):  # p itself, then k others
        others = sorted((j for j in everyone if j != p), key=lambda j: (plain[p][j], j))
        return [p, *others[:k]]

    def reciprocal(p, k):
        return {q for q in nearest(p, k) if p in nearest(q, k)}

    vectors = []
    for p in everyone:
        members = reciprocal(p, k1)
        grown = set(members)
        for q in members:
            candidates = reciprocal(q, round(k1 / 2))
            if 3 * len(candidates & members) > 2 * len(candidates):
                grown |= candidates
        weights = {g: math.exp(-scaled[p][g]) for g in grown}
        vectors.append({g: value / math.fsum(weights.values()) for g, value in weights.items()})
    averaged = []
    for p in everyone:
        near = nearest(p, k2 - 1)
        keys = set().union(*(vectors[q] for q in near))
        averaged.append({key: math.fsum(vectors[q].get(key, 0.0) for q in near) / k2 for key in keys})

    def jaccard(p, g):
        keys = averaged[p].keys() | averaged[g].keys()
        least = math.fsum(min(averaged[p].get(key, 0.0), averaged[g].get(key, 0.0)) for key in keys)
        most = math.fsum(max(averaged[p].get(key, 0.0), averaged[g].get(key, 0.0)) for key in keys)
        return 1 - least / most

    return np.array([[(1 - weight) * jaccard(p, g) + weight * scaled[p][g] for g in gallery] for p in queries])


def slow_expansion(queries, gallery, own, n, alpha):
    """Return unit queries (Q, D), each the sum of itself and of its n nearest gallery rows times cosine^alpha."""
    expanded = []
    for number, query in enumerate(queries):
        order = sorted(range(len(gallery)), key=lambda j: (squared(query, gallery[j]), j))
        chosen = [j for j in order if own is None or j != own[number]][:n]
        total = [float(value) for value in query]
        for j in chosen:
            cosine = math.fsum(float(x) * float(y) for x, y in zip(query, gallery[j], strict=True))
            weight = cosine**alpha if cosine > 0 else 0.0
            total = [value + weight * float(other) for value, other in zip(total, gallery[j], strict=True)]
        length = math.sqrt(math.fsum(value**2 for value in total))
        expanded.append([value / length for value in total])
    return np.array(expanded)


def slow_ranks(distances, relevant):
    """Return for each query the ranks, from 1, of its relevant images, by (distance, index)."""
    found = []
    for row, right in zip(distances, relevant, strict=True):
        order = sorted(range(len(row)), key=lambda j: (round(row[j], 10), j))
        found.append([rank for rank, j in enumerate(order, start=1) if right[j] and np.isfinite(row[j])])
    return found
