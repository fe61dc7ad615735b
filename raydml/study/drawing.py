"""The trials of a search that are drawn while it runs: each is recorded as an event before it starts.

A study that is resumed has the trials that its events have, and draws the others as it would have: a proposal depends
on the trials before it and their results, and on nothing else (see `raydml.study.draws`).

With the scheduler ``sync`` the results that a proposal knows do not depend on the order in which they arrive either:
they are the values at the first rung of all trials of earlier generations (`study.search.generation` trials in a row),
and a generation begins when all of these are known. So the same seed gives the same study on any number of workers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from raydml.analysis.trials import TrialState
from raydml.config.trial import Trial, fingerprint, parse_trial
from raydml.data.digests import ImageRecord
from raydml.ops.wording import counted
from raydml.search_space.points import read_point, written_point
from raydml.search_space.space import load_space
from raydml.searchers._base import DrawnBefore
from raydml.study import events
from raydml.study.draws import TrialDraws
from raydml.study.events import DrawnConfiguration, StudyReader, events_path
from raydml.study.folder import prepare_images, prepared_by, settings_of
from raydml.study.limits import Limits
from raydml.study.retention import drop_checkpoints
from raydml.study.rungs import milestones
from raydml.training.trial_images import Catalogs, with_content


def search_key(index: int) -> str:
    """Return the key of a trial of the search."""
    return f"search-{index:03d}"


def trials_of_search(
    study_json: Mapping[str, Any], drawn: Mapping[str, DrawnConfiguration] = MappingProxyType({})
) -> dict[str, Trial]:
    """Return the trials of a search by key, as far as they are known. drawn: of its events.

    Of a search whose searcher needs results, the trials that need none are known, and those that were drawn.
    """
    planned = {search_key(index): trial for index, trial in enumerate(study_json["trials"])}
    num_known = study_json.get("num_known")
    if num_known is not None:
        known = list(planned)[:num_known]
        planned = {
            key: drawn[key].config if key in drawn else planned[key] for key in planned if key in {*known, *drawn}
        }
    return {key: parse_trial(trial) for key, trial in planned.items()}


class DrawnSearch:
    """The trials of a search of which some need results.

    Args:
        folder: of the study.
        study_json: its study.json, which has ``points``.

    keys: of all trials of the search, in order. max_epochs: of any of them.
    """

    def __init__(self, folder: Path, study_json: Mapping[str, Any]) -> None:
        self._folder, self._path = folder, events_path(folder)
        self._study, self._machine = settings_of(folder, study_json)
        number = f"study.search.num_trials={self._study.search.num_trials}"
        space = load_space(folder / "resolved_space.json", [number])
        self._draws = TrialDraws(replace(space, study=self._study, machine=self._machine))
        self.keys = [search_key(index) for index in range(len(study_json["trials"]))]
        self.max_epochs = max(int(trial["epochs"]) for trial in study_json["trials"])
        self._is_sync = self._study.search.scheduler == "sync"
        self._rungs = milestones(
            max_epochs=self.max_epochs,
            grace_epochs=self._study.search.grace_epochs,
            reduction_factor=self._study.search.reduction_factor,
        )
        self._catalogs = Catalogs(self._machine, record=ImageRecord.of_study(folder))
        self._limits = Limits(self._catalogs, 0 if self._study.confirm is None else self._study.confirm.folds)
        self._reader = StudyReader(folder)
        self._reader.read_on()
        state = self._reader.now()
        self.trials = trials_of_search(study_json, state.drawn)
        points = [read_point(point) for point in study_json["points"]]
        self._before = [
            DrawnBefore(read_point(state.drawn[key].point) if key in state.drawn else points[index])
            for index, key in enumerate(self.trials)
        ]
        self._states: list[TrialState | None] = [None] * len(self.trials)
        self._taken = {fingerprint(trial) for trial in self.trials.values()}
        self._eliminated: set[str] = set()
        # The driver has prepared those of all planned trials before.
        self._prepared = {prepared_by(parse_trial(trial)) for trial in study_json["trials"]}
        # Of trials whose draw was lost with the end of the events: they are drawn again, and may be others.
        for key in self.keys[len(self.trials) :]:
            if any((folder / "search").glob(f"run-*/{key}")):
                drop_checkpoints(folder, "search", key)
        self.is_over = len(self.trials) >= len(self.keys)

    @property
    def num_trials(self) -> int:
        """Of the search, also where the space has no further configurations."""
        return len(self.trials) if self.is_over else len(self.keys)

    def next(self, num_waiting: int) -> tuple[str, Trial] | None:
        """Draw the next trial, record it and return it with its key; None where that has to wait, or none is left.

        num_waiting: the trials that are drawn and have not started. Without the scheduler ``sync``, a trial is drawn
        when none waits: so it knows the results that there are when a slot becomes free.
        """
        index = len(self.trials)
        if self.is_over or (num_waiting and not self._is_sync):
            return None
        self._reader.read_on()
        before = self._known_to(index)
        if before is None:
            return None
        drawn = self._draws.draw(index, before, self._taken, self._finished, refuse_invalid=False)
        if drawn is None:
            self.is_over = True
            self._note(f"the space has no further configuration: the search has {counted(index, 'trial')}")
            return None
        if (needed := prepared_by(drawn.trial)) not in self._prepared:
            prepare_images(self._machine, [drawn.trial], self._catalogs)
            self._prepared.add(needed)
        self._note_eliminations(index, before)
        key, config = self.keys[index], drawn.trial.model_dump(mode="json")
        events.append(
            self._path,
            {"event": "trial_drawn", "stage": "search", "trial": key, "config": config,
             "point": written_point(drawn.point), "num_known": sum(trial.value is not None for trial in before)},
        )  # fmt: skip
        self.trials[key] = drawn.trial
        self._before.append(DrawnBefore(drawn.point))
        self._states.append(None)
        self._taken.add(fingerprint(drawn.trial))
        self.is_over = len(self.trials) >= len(self.keys)
        return key, drawn.trial

    def _finished(self, trial: Trial) -> Trial:
        return with_content(self._limits.cut(trial), self._catalogs.of(trial))

    def _known_to(self, index: int) -> Sequence[DrawnBefore] | None:
        """Return the trials before one, with the results that its proposal knows; None while some have to arrive."""
        for number, key in enumerate(self.trials):
            state = self._reader.trials.get(key)
            if state is not self._states[number]:
                self._states[number] = state
                self._before[number] = _as_drawn(self._before[number], state)
        if not self._is_sync:
            return self._before
        generation = self._study.search.generation
        num_earlier = index // generation * generation
        rung = self._rungs[0] if self._rungs else self.max_epochs
        known = []
        for number, trial in enumerate(self._before):
            if number >= num_earlier:
                known.append(DrawnBefore(trial.point))
            elif rung in trial.curve or trial.is_over:
                value = trial.curve.get(rung)
                curve = {} if value is None else {rung: value}
                known.append(DrawnBefore(trial.point, value, rung, True, curve))
            else:
                return None
        return known

    def _note_eliminations(self, index: int, before: Sequence[DrawnBefore]) -> None:
        for found in self._draws.eliminations(index, before).values():
            text = f"search.balance: {found.option} gets no further trials"
            if found.option in self._eliminated or any(text in note for note in self._reader.now().notes):
                continue
            self._eliminated.add(found.option)
            self._note(
                f"{text} after {found.num_trials}: by their values at epoch {found.epoch}, the best of all that are "
                f"left would stay below {found.reachable:.4f}, and the best so far has {found.best:.4f}"
            )

    def _note(self, text: str) -> None:
        events.append(self._path, {"event": "note", "text": text})


def _as_drawn(drawn: DrawnBefore, state: TrialState | None) -> DrawnBefore:
    """Return a trial with its results so far."""
    if state is None:
        return DrawnBefore(drawn.point)
    curve = {epoch: value for epoch, value in state.curve(state.metric) if math.isfinite(value)}
    return DrawnBefore(drawn.point, state.best, state.num_epochs, bool(state.ended), curve)


def is_drawn_later(study_json: Mapping[str, Any]) -> bool:
    """Return whether some trials of a search are drawn while it runs."""
    return study_json.get("points") is not None
