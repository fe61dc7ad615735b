"""What the terminal shows while something runs: bars of long steps, and the live view of a study.

Both are on stderr or stdout where that is a terminal; without one, a study prints plain lines. ``LiveStudy`` follows
``events.jsonl`` in its own thread and never changes the study. ``view`` and ``line`` turn a state into what is shown.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.filesize import decimal
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from raydml.analysis.trials import FAILURES, TrialState
from raydml.cli.arguments import echo
from raydml.cli.tables import embedding_dim, learning_rate, metric_label, trial_table
from raydml.ops.progress import StepProgress, progress_of
from raydml.study import events
from raydml.study.events import Event, StudyState, reduce_event, reduce_events

POLL_S = 0.2
PATIENCE_S = 1.0  # a shorter step gets no bar


def duration(seconds: float) -> str:
    """Return ``0:48``, ``12:03`` or ``1:02:03``."""
    minutes, second = divmod(max(round(seconds), 0), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02d}:{second:02d}" if hour else f"{minute}:{second:02d}"


def headline(study: StudyState) -> Text:
    """Return ``study digits  search: 3 running, 9 of 16 ended, best search-004 MAP@R 0.7312``."""
    text = Text.assemble(("study ", "dim"), (study.study, "bold"), no_wrap=True, overflow="ellipsis")
    if not study.stage:
        return text.append("  starting Ray", "dim")
    trials, plan = study.of_stage(study.stage), study.stages.get(study.stage)
    num_ended = sum(bool(trial.ended) for trial in trials)
    text.append("  ").append(study.stage, "bold cyan")
    if plan and plan.num_trials and trials:
        num_running = sum(trial.state in ("running", "retrying") for trial in trials)
        doing = "interrupted" if study.state == "interrupted" else f"{num_running} running"
        text.append(f": {doing}, {num_ended} of {plan.num_trials} ended")
    if study.stage == "finalize":
        text.append(f": test classes opened {study.num_test_reads} times")
    best = study.best_of_stage(study.stage)
    if best is not None:
        text.append(f", best {best.trial} {metric_label(study.metric)} {best.best:.4f}")
    failed = sum(trial.state in FAILURES for trial in trials)
    return text.append(f", {failed} failed", "red") if failed else text


def view(study: StudyState, *, width: int, height: int, eta_s: float | None = None) -> RenderableType:
    """Return the whole view for a terminal of ``width`` x ``height`` characters; it never exceeds the height."""
    notes = dict.fromkeys(study.notes)  # a resumed study repeats them
    parts: list[RenderableType] = [*(Text(note, style="dim") for note in notes), headline(study)]
    done, total = study.settled(study.stage)
    trials = study.of_stage(study.stage)
    if trials:
        limit = max(height - 5 - len(notes), 4)
        parts.append(trial_table(study, study.stage, width=width, limit=limit))
        hidden = len(trials) - min(limit, len(trials))
        if hidden:
            parts.append(Text(f"... and {hidden} more trials that are not among the best", style="dim"))
    if total:
        bar = Table.grid(padding=(0, 2))
        eta = "" if eta_s is None else f"ETA {duration(eta_s)}"
        bar_width = max(min(width - 40, 60), 10)
        bar.add_row(ProgressBar(total=total, completed=done, width=bar_width), f"{done}/{total} epochs", eta)
        parts.append(bar)
    return Group(*parts)


def line(study: StudyState, event: Event) -> str | None:
    """Return one plain line for an event, given the state after it; None for events without a line (every epoch)."""
    kind = event.get("event")
    if kind == "study_started":
        return f"study {study.study}"
    if kind == "stage_started":
        plan = study.stages[str(event["stage"])]
        size = f": {plan.num_trials} trials of at most {plan.max_epochs} epochs" if plan.max_epochs else ""
        return f"{plan.stage}{size}"
    if kind == "stage_finished":
        best = study.best_of_stage(str(event["stage"]))
        won = f", best {best.trial} {metric_label(study.metric)} {best.best:.4f}" if best else ""
        return f"{event['stage']} finished{won}"
    if kind == "note":
        return f"note: {event.get('text', '')}"
    if kind in ("interrupted", "study_finished"):
        return f"study {study.study} {'interrupted' if kind == 'interrupted' else 'finished'}"
    if kind in ("trial_started", "trial_retried", "trial_ended"):
        return _trial_line(study, study.trials[str(event["trial"])], str(kind))
    return None


def _trial_line(study: StudyState, trial: TrialState, kind: str) -> str:
    if kind == "trial_started":
        details = [f"dim {embedding_dim(trial)}", f"lr {learning_rate(trial)}"]
        if trial.fold is not None:
            details = [f"fold {trial.fold}", f"seed {trial.seed}"]
        if trial.num_epochs:
            details.append(f"from epoch {trial.num_epochs}")
        return f"{trial.trial} started: {trial.recipe}, {', '.join(details)}"
    error = (trial.retried_after if kind == "trial_retried" else trial.error or "").strip()
    why = f": {error.splitlines()[-1]}" if error else ""
    if kind == "trial_retried":
        return f"{trial.trial} failed after epoch {trial.num_epochs}, retry {trial.num_retries}{why}"
    state = trial.state.replace("_", " ")
    done = state if trial.state in ("finished", "stopped_early") else f"failed ({state})"
    best = "" if trial.best is None else f", best {metric_label(study.metric)} {trial.best:.4f}"
    return f"{trial.trial} {done} after epoch {trial.num_epochs}/{trial.num_planned_epochs}{best}{why}"


class LiveStudy:
    """Shows a study while it runs: ``with LiveStudy(folder / "events.jsonl"): run_study(folder)``.

    Events before ``from_offset`` (bytes) are history, which one line summarises. A terminal redraws the view in place;
    elsewhere (a pipe, a log file, TERM=dumb) every event is one plain line without control codes.
    """

    def __init__(
        self,
        events_path: Path,
        from_offset: int = 0,
        *,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.console = console or Console()
        self.study = StudyState()
        self._path = events_path
        self._offset = 0
        self._history_ends = from_offset
        self._clock = clock
        self._pace: tuple[str, float, int] | None = None  # stage, time of its first event here, epochs settled then
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="live-study", daemon=True)
        self._live: Live | None = None

    def __enter__(self) -> LiveStudy:
        self._replay_history()
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            self._live = Live(get_renderable=self._picture, console=self.console, refresh_per_second=4, transient=False)
            self._live.start()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(timeout=5)
        self._read_on()
        if self._live is not None:
            self._live.stop()

    def eta_s(self) -> float | None:
        """Return the seconds to the end of the stage at the pace of this run; None before its third epoch."""
        done, total = self.study.settled(self.study.stage)
        if self._pace is None or done >= total:
            return None
        _, began, done_then = self._pace
        elapsed = self._clock() - began
        return (total - done) * elapsed / (done - done_then) if done - done_then >= 3 else None

    def _replay_history(self) -> None:
        if not self._history_ends:
            return
        history, self._offset = events.read_from(self._path, until=self._history_ends)
        self.study = reduce_events(history)
        ended = sum(bool(trial.ended) for trial in self.study.trials.values())
        epochs = sum(trial.num_epochs for trial in self.study.trials.values())
        started = f"{ended} of {len(self.study.trials)} started trials have ended"
        echo(self.console, f"resuming {self.study.study}: {started}, {epochs} epochs are done")

    def _follow(self) -> None:
        while not self._stop.wait(POLL_S):
            self._read_on()

    def _read_on(self) -> None:
        new, self._offset = events.read_from(self._path, self._offset)
        for event in new:
            self.study = reduce_event(self.study, event)
            stage = self.study.stage
            if stage and (self._pace is None or self._pace[0] != stage):
                self._pace = (stage, self._clock(), self.study.settled(stage)[0])
            text = line(self.study, event)
            if self._live is None and text:
                echo(self.console, text)

    def _picture(self) -> RenderableType:
        size = self.console.size
        return view(self.study, width=size.width, height=size.height, eta_s=self.eta_s())


class StepBars(logging.Handler):
    """Shows the progress of long steps: a bar from a second after a step's first report to its last one."""

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(level=logging.DEBUG)
        self.clock = clock
        self.console = console or Console(stderr=True)
        self._bars: Progress | None = None
        self._tasks: dict[str, tuple[float, int, TaskID | None]] = {}  # begin_s, done at the first report, bar

    def emit(self, record: logging.LogRecord) -> None:
        step = progress_of(record)
        if step is None:
            return
        now_s = self.clock()
        begin_s, at_first, bar = self._tasks.get(step.name, (now_s, step.done, None))
        waited_s = now_s - begin_s
        if bar is None and waited_s >= PATIENCE_S and not step.ended and self.console.is_terminal:
            bar = self._new_bar(step)
        self._tasks[step.name] = (begin_s, at_first, bar)
        rate = (step.done - at_first) / waited_s if waited_s > 0 else 0.0
        if bar is not None and self._bars is not None:
            self._bars.update(bar, completed=step.done, total=step.total, amounts=_amounts(step, rate))
        if step.ended:
            self._finish(step, bar)

    def _new_bar(self, step: StepProgress) -> TaskID:
        if self._bars is None:
            self._bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[amounts]}"),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
            self._bars.start()
        return self._bars.add_task(step.name, total=step.total, amounts="")

    def _finish(self, step: StepProgress, bar: TaskID | None) -> None:
        del self._tasks[step.name]
        if bar is not None and self._bars is not None:
            self._bars.remove_task(bar)
            if not self._bars.tasks:
                self._bars.stop()
                self._bars = None

    def close(self) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None
        super().close()


def _amounts(step: StepProgress, rate: float) -> str:
    """``310.2 MB of 1.2 GB  8.1 MB/s`` or ``3,120 of 11,788  840 images/s``"""
    size, unit = (decimal, "") if step.unit == "bytes" else ("{:,}".format, f" {step.unit}")
    total = "" if step.total is None else f" of {size(step.total)}"
    return f"{size(step.done)}{total}  {size(round(rate))}{unit}/s"
