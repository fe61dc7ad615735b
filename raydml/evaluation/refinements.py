"""Refinements of an evaluation: test-time augmentation, whitening and re-ranking, each scored beside the plain one.

A refinement uses more than the two embeddings that it compares: further views, other images to learn from, or the rest
of the gallery. Its numbers are therefore never mixed with the plain ones: each has a name and a protocol of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from raydml.data.catalog import Groups
from raydml.errors import did_you_mean
from raydml.evaluation.embed import RefinedEvaluation, evaluate_embeddings
from raydml.evaluation.nearness import Floats, Integers
from raydml.evaluation.reranking import KReciprocal, QueryExpansion, Rerank
from raydml.evaluation.scoring import MetricSpec, ScoringError
from raydml.evaluation.views import describe_tta
from raydml.evaluation.whitening import Whitening

#: Name -> settings, each with its type and smallest value.
_RERANKS: dict[str, dict[str, tuple[type, float]]] = {
    "k_reciprocal": {"k1": (int, 1), "k2": (int, 1), "lambda": (float, 0)},
    "query_expansion": {"n": (int, 1), "alpha": (float, 0)},
}


class Refinements(NamedTuple):
    """What is scored beside the plain embeddings; None leaves a step out.

    tta: one of views.TTA, and view_rows (N, D) its embeddings. whitening: learned on other images. rerank: settings.
    """

    tta: str | None = None
    view_rows: Floats | None = None
    whitening: Whitening | None = None
    rerank: Rerank | None = None


def parse_rerank(text: str) -> Rerank:
    """Return the settings of "k_reciprocal", "k_reciprocal:k1=20,k2=6,lambda=0.3" or "query_expansion:n=10,alpha=3".

    Raises ScoringError for unknown names and values that are out of range.
    """
    name, _, rest = text.partition(":")
    if name not in _RERANKS:
        nearest = did_you_mean(name, _RERANKS) or "."
        raise ScoringError(
            f"--rerank {text}: {name!r} is not one of {', '.join(_RERANKS)}{nearest} Cure: {_examples(_RERANKS)}"
        )
    known, given = _RERANKS[name], dict[str, Any]()
    for part in filter(None, rest.split(",")):
        key, _, value = (word.strip() for word in part.partition("="))
        if key not in known:
            raise ScoringError(
                f"--rerank {text}: {key!r} is not a setting of {name}: {', '.join(known)}. Cure: {_examples([name])}"
            )
        kind, least = known[key]
        try:
            given[key] = kind(value)
        except ValueError as error:
            what = "a whole number" if kind is int else "a number"
            raise ScoringError(
                f"--rerank {text}: {key} = {value!r} is not {what}. Cure: {_examples([name])}"
            ) from error
        most = 1 if key == "lambda" else 10**6
        if not least <= given[key] <= most:
            raise ScoringError(
                f"--rerank {text}: {key} = {value} is not between {least:g} and {most:,}. Cure: {_examples([name])}"
            )
    if name == "query_expansion":
        return QueryExpansion(**given)
    if "lambda" in given:
        given["original_weight"] = given.pop("lambda")
    return KReciprocal(**given)


def _examples(names: Iterable[str]) -> str:
    """Return each re-ranking with its default settings, as the command line takes it."""
    defaults: list[Rerank] = [KReciprocal(), QueryExpansion()]
    settings = {one.name: ",".join(f"{key}={value:g}" for key, value in one.settings.items()) for one in defaults}
    return " or ".join(f"--rerank {name}:{settings[name]}" for name in names)


def evaluate_refinements(
    rows: Floats,
    labels: Integers,
    roles: Sequence[str] | None,
    protocols: Sequence[str],
    spec: MetricSpec,
    device: str,
    lists: Mapping[str, Sequence[int]],
    refinements: Refinements,
    groups: Groups | None = None,
) -> tuple[RefinedEvaluation, ...]:
    """Score each refinement by itself and, where there are several, all of them in turn.

    The order is that of `Refinements`: whitening is applied to the embeddings of test-time augmentation, and what comes
    of it is re-ranked. Re-ranking changes neither clusters nor geometry, and compares the embeddings themselves.

    rows: (N, D), the plain embeddings. The other arguments are those of `evaluate_embeddings`.

    Raises ScoringError where re-ranking has nothing to score, and what `evaluate_embeddings` raises.
    """
    given = [step for step in ("tta", "whitening", "rerank") if getattr(refinements, step) is not None]
    found = []
    for chain in [*([step] for step in given), *([given] if len(given) > 1 else [])]:
        names, sentences, settings, refined, of_chain = [], [], dict[str, dict[str, Any]](), rows, spec
        if "tta" in chain:
            assert refinements.tta is not None
            assert refinements.view_rows is not None
            names.append(refinements.tta)
            sentences.append(describe_tta(refinements.tta))
            refined, settings[refinements.tta] = refinements.view_rows, {}
        if "whitening" in chain:
            assert refinements.whitening is not None
            names.append("pca")
            sentences.append(refinements.whitening.sentence)
            refined, settings["pca"] = refinements.whitening.apply(refined), refinements.whitening.settings
        if "rerank" in chain:
            assert refinements.rerank is not None
            names.append(refinements.rerank.name)
            sentences.append(refinements.rerank.sentence)
            settings[refinements.rerank.name] = refinements.rerank.settings
            of_chain = _spec_of_rerank(spec, refinements.rerank)
        evaluation = evaluate_embeddings(refined, labels, roles, protocols, of_chain, device, lists, groups)
        worded = {key: "; ".join([sentence, *sentences]) for key, sentence in evaluation.protocols.items()}
        found.append(RefinedEvaluation("+".join(names), settings, evaluation._replace(protocols=worded)))
    return tuple(found)


def _spec_of_rerank(spec: MetricSpec, rerank: Rerank) -> MetricSpec:
    groups = tuple(group for group in spec.groups if group in ("retrieval", "ranking"))
    if not groups or "float" not in spec.codes:
        raise ScoringError(
            f"--rerank {rerank.name}: it orders float embeddings anew, and no metric of --metrics "
            f"{','.join(spec.groups)} of --codes {','.join(spec.codes)} depends on that order. Cure: --metrics "
            "retrieval --codes float, or leave --rerank out"
        )
    return spec._replace(groups=groups, codes=("float",), rerank=rerank)
