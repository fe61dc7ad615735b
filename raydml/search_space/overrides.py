"""`--set trial.optimizer.learning_rate=1e-3`: changes to a space from the command line, before it is validated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from raydml.errors import ABSENT, Problem, join_path, nearest_name
from raydml.search_space.domains import DOMAINS, shared_keys
from raydml.search_space.yaml_reader import Node, read_yaml

ORIGIN = "--set"
TOP = ("study", "trial", "machine")


def with_overrides(
    root: Node, overrides: Iterable[str], known: Mapping[str, Sequence[str]]
) -> tuple[Node, list[Problem]]:
    """The tree with every ``path=value`` put in, and the problems of those that could not be.

    The value is YAML and may be a domain. known: top-level key -> the keys below it, for the help on a path that
    lacks its top-level key.
    """
    problems: list[Problem] = []
    for text in overrides:
        path, equals, written = text.partition("=")
        steps = path.strip().split(".")
        mistake = _path_mistake(text, steps, equals, known)
        if mistake is not None:
            problems.append(mistake)
            continue
        value, unreadable = read_yaml(written, ORIGIN, lines=False)
        problems += [problem.under(path) for problem in unreadable]
        if value is None:
            continue
        changed = _put(root, steps, value, "")
        if isinstance(changed, Problem):
            problems.append(changed)
        else:
            root = changed
    return root, problems


def _path_mistake(text: str, steps: list[str], equals: str, known: Mapping[str, Sequence[str]]) -> Problem | None:
    if not equals:
        return Problem(text, ABSENT, "has no =", cure="write --set key=value, such as trial.epochs=5", where=ORIGIN)
    if not all(steps):
        return Problem(text, ABSENT, "has an empty key", cure="write --set trial.epochs=5", where=ORIGIN)
    if steps[0] in TOP and len(steps) > 1:
        return None
    path = ".".join(steps)
    message = f"a path starts with {', '.join(f'{top}.' for top in TOP)}"
    owners = [top for top in TOP if steps[0] in known[top]]
    if owners:
        cure = f"write {' or '.join(f'{top}.{path}' for top in owners)}"
        return Problem(path, ABSENT, message, nearest=f"{owners[0]}.{path}", cure=cure, where=ORIGIN)
    nearest = nearest_name(steps[0], TOP)
    whole = ".".join([nearest, *steps[1:]]) if nearest else None
    cure = f"write {whole}" if whole else f"write --set {TOP[1]}.key=value"
    return Problem(path, ABSENT, message, TOP, whole, cure, ORIGIN)


def _put(node: Node, steps: list[str], value: Node, path: str) -> Node | Problem:
    if not steps:
        return Node(value.value, ORIGIN)
    entries = {} if node.value is None else node.value
    if not isinstance(entries, dict):
        cure = f"set {path} as a whole"
        return Problem(join_path(path, *steps), ABSENT, f"{path} is not a block of keys", cure=cure, where=ORIGIN)
    domain = next((name for name in entries if name in DOMAINS), None)
    if domain is not None and steps != ["first"]:
        message, cure = f"{path} is a {domain}", f"set {path} as a whole, or change the file"
        return Problem(join_path(path, *steps), ABSENT, message, cure=cure, where=ORIGIN)
    step, *rest = steps
    if rest and step not in entries:
        owner = next((key for key in entries if step in shared_keys(key) and "," in key), None)
        if owner is not None:
            whole = join_path(path, step)
            message = f"{step} is supplied by the blocks of `{owner}`"
            cure = f"set {whole} as a whole (it then replaces what the blocks say), or change the file"
            return Problem(join_path(path, *steps), ABSENT, message, cure=cure, where=ORIGIN)
    changed = _put(entries.get(step, Node(None, ORIGIN)), rest, value, join_path(path, step))
    return changed if isinstance(changed, Problem) else Node({**entries, step: changed}, node.where)
