"""What one protocol and one kind of codes give, by the plain names of the metrics."""

from raydml.evaluation.scoring import MetricSpec, score_by_all


def score(
    embeddings,
    labels,
    *,
    recall_at=(1, 2, 4, 8),
    protocol="leave_one_out",
    roles=None,
    codes="float",
    groups=("retrieval",),
    device="cpu",
    lone_misses=False,
):
    """Metric -> value, without the prefix of the codes; the rest as in `MetricSpec`."""
    spec = MetricSpec(recall_at, (codes,), groups, lone_misses=lone_misses)
    scored = score_by_all(embeddings, labels, roles, (protocol,), spec, device)
    return {name.removeprefix(f"{codes}_"): value for name, value in scored.metrics.items()}
