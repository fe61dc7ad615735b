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

from raydml.analysis.trials import OUT_OF_MEMORY, TrialState
from raydml.config.trial import Trial, fingerprint, parse_trial
from raydml.data.digests import ImageRecord
from raydml.ops.wording import counted
from raydml.search_space.points import Point, read_point, written_point
from raydml.search_space.space import load_space
from raydml.searchers._base import DrawnBefore
from raydml.study import events
from raydml.study.draws import TrialDraws
from raydml.study.events import DrawnConfiguration, StudyReader, events_path
from raydml.study.folder import all_search_keys, planned_search, prepare_images, prepared_by, settings_of
from raydml.study.limits import Limits
from raydml.study.remote import files_of_study
from raydml.study.shares import ELIMINATED
from raydml.training.trial_images import Catalogs, with_content

#: How many draws can be lost with the end of the events: more than a driver makes in the seconds before a crash.
_MAX_LOST_DRAWS = 64


def trials_of_search(
    study_json: Mapping[str, Any], drawn: Mapping[str, DrawnConfiguration] = MappingProxyType({})
) -> dict[str, Trial]:
    """Return the trials of a search by key, as far as they are known. drawn: of its events.

    Of a search whose searcher needs results, the trials that need none are known, and those that were drawn.
    """
    later = {key: drawn[key].config for key in all_search_keys(study_json) if key in drawn}
    return {key: parse_trial(trial) for key, trial in {**planned_search(study_json), **later}.items()}


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
        self.keys = all_search_keys(study_json)
        self.max_epochs, self._rungs = self._draws.max_epochs, self._draws.rungs
        self._is_sync = self._study.search.scheduler == "sync"
        self._catalogs = Catalogs(self._machine, record=ImageRecord.of_study(folder))
        confirmed = 0 if self._study.confirm is None else self._study.confirm.folds
        self._limits = Limits(self._catalogs, confirmed, self._study.search.folds)
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
        self._num_arrived = 0  # of the trials in their order, with sync: at the first rung
        self._taken = {fingerprint(trial) for trial in self.trials.values()}
        # Those that the notes name stay without further trials, also where later results would let them go on.
        self._eliminated = {name for note in state.notes for name in ELIMINATED.findall(note)}
        # The driver has prepared those of all planned trials before.
        self._prepared = {prepared_by(parse_trial(trial)) for trial in study_json["trials"]}
        # Of trials whose draw was lost with the end of the events: they are drawn again, and may be others.
        if state.trials:
            files = files_of_study(folder)
            for key in self.keys[len(self.trials) :][:_MAX_LOST_DRAWS]:
                for failure in files.drop_checkpoints("search", key):
                    self._note(failure)
        self.is_over = len(self.trials) >= len(self.keys)

    @property
    def num_trials(self) -> int:
        """Of the search, also where the space has no further configurations."""
        return len(self.trials) if self.is_over else len(self.keys)

    def next(self, *, is_slot_free: bool = True) -> tuple[str, Trial] | None:
        """Draw the next trial, record it and return it with its key; None where that has to wait, or none is left.

        is_slot_free: whether fewer trials run, or wait for a slot, than there are slots. With the scheduler ``sync`` a
        trial is drawn as soon as its generation begins.
        """
        index = len(self.trials)
        if self.is_over or not (is_slot_free or self._is_sync):
            return None
        self._reader.read_on()
        before = self._known_to(index)
        if before is None:
            return None
        eliminated = self._all_eliminated(index, before)
        drawn = self._draws.draw(
            index, before, self._taken, self._finished, refuse_invalid=False, eliminated=eliminated
        )
        if drawn is None:
            self.is_over = True
            self._note(f"the space has no further configuration: the search has {counted(index, 'trial')}")
            return None
        if (needed := prepared_by(drawn.trial)) not in self._prepared:
            prepare_images(self._machine, [drawn.trial], self._catalogs)
            self._prepared.add(needed)
        key, config = self.keys[index], drawn.trial.model_dump(mode="json")
        num_known = sum(trial.has_result and trial.value is not None for trial in before)
        events.append(
            self._path,
            {"event": "trial_drawn", "stage": "search", "trial": key, "config": config,
             "point": written_point(drawn.point), "num_known": num_known},
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
        generation = self._study.search.generation
        num_earlier = index // generation * generation if self._is_sync else index
        keys = list(self.trials)
        while self._is_sync and self._num_arrived < num_earlier:
            if self._first_result(self._reader.trials.get(keys[self._num_arrived]), self._num_arrived) is None:
                return None
            self._num_arrived += 1
        known = []
        for number, key in enumerate(keys):
            state = self._reader.trials.get(key)
            if not self._is_sync:
                if state is not self._states[number]:
                    self._states[number] = state
                    self._before[number] = self._with_results(self._before[number].point, state)
            elif number < num_earlier:
                found = self._first_result(state, number)
                assert found is not None
                known.append(found)
            else:
                known.append(DrawnBefore(self._before[number].point))
        return known if self._is_sync else self._before

    def _first_result(self, state: TrialState | None, number: int) -> DrawnBefore | None:
        """Return a trial with its value at the first rung; None while it has yet to arrive there.

        One that ended before has its last value, and none if it failed. One that has found no memory runs again after
        all others, and does not keep them waiting.
        """
        point = self._before[number].point
        if state is None:
            return None
        curve = dict(state.curve(state.metric))
        rung = self._rungs[0] if self._rungs else self.max_epochs
        if rung in curve and math.isfinite(curve[rung]):
            return DrawnBefore(point, curve[rung], rung, True, {rung: curve[rung]})
        if state.ended == "finished":
            return DrawnBefore(point, state.best, state.num_epochs, True)
        if state.ended or OUT_OF_MEMORY in state.retry_reasons:
            return DrawnBefore(point, None, state.num_epochs, True)
        return None

    def _with_results(self, point: Point, state: TrialState | None) -> DrawnBefore:
        """Return a trial with its results so far. Its value counts from the first rung on, where it may wait long."""
        if state is None:
            return DrawnBefore(point)
        curve = {epoch: value for epoch, value in state.curve(state.metric) if math.isfinite(value)}
        has_result = bool(state.ended) or (bool(self._rungs) and state.num_epochs >= self._rungs[0])
        return DrawnBefore(point, state.best, state.num_epochs, has_result, curve)

    def _all_eliminated(self, index: int, before: Sequence[DrawnBefore]) -> set[int]:
        """Return the positions of the options that get no further trials, and note those that are new."""
        shares = self._draws.shares
        if shares is None:
            return set()
        for found in self._draws.eliminations(index, before).values():
            if found.option in self._eliminated:
                continue
            self._eliminated.add(found.option)
            self._note(
                f"search.balance: {found.option} gets no further trials after {found.num_trials}: by their values at "
                f"epoch {found.epoch}, the best of all that are left would stay below {found.reachable:.4f}, and the "
                f"best so far has {found.best:.4f}"
            )
        return {position for position, name in enumerate(shares.names) if name in self._eliminated}

    def _note(self, text: str) -> None:
        events.append(self._path, {"event": "note", "text": text})


def is_drawn_later(study_json: Mapping[str, Any]) -> bool:
    """Return whether some trials of a search are drawn while it runs."""
    return study_json.get("points") is not None
