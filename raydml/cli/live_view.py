"""What the terminal shows while something runs: bars of long steps, and the live view of a study.

Both are on stderr or stdout where that is a terminal; without one, a study prints plain lines. ``LiveStudy`` follows
``events.jsonl`` in its own thread and never changes the study. ``view`` and ``line`` turn a state into what is shown.
"""

from __future__ import annotations

import contextlib
import logging
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.filesize import decimal
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from raydml.analysis.trials import ENDINGS, FAILURES, LIMITS, MOVES, TrialState
from raydml.cli.arguments import echo
from raydml.cli.tables import (
    best_searched,
    confirmed_means,
    embedding_dim,
    learning_rate,
    metric_label,
    run_name,
    trial_table,
)
from raydml.ops.progress import StepProgress, progress_of
from raydml.ops.wording import counted
from raydml.study import events
from raydml.study.events import STAGES, Event, Reduction, StudyState, letters_of
from raydml.study.pace import remaining_s
from raydml.study.process import STOP_SIGNALS

POLL_S = 0.2
ESTIMATE_SHARE = 0.02  # largest part of the time for estimates of the time that is left: each reads every trial
PATIENCE_S = 1.0  # a shorter step gets no bar
STOPPING, STOPPING_NOW = "stopping ... (Ctrl-C again: now)", "stopping now ..."


def duration(seconds: float) -> str:
    """Return ``0:48``, ``12:03`` or ``1:02:03``."""
    minutes, second = divmod(max(round(seconds), 0), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02d}:{second:02d}" if hour else f"{minute}:{second:02d}"


def rough_time(seconds: float) -> str:
    """Return an estimate in round numbers: ``about 20 s``, ``about 7 min`` or ``about 1 h 20 min``."""
    if seconds < 95:
        return f"about {max(round(seconds / 10), 1) * 10} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"about {minutes} min"
    hours, minutes = divmod(round(minutes / 10) * 10, 60)
    return f"about {hours} h" + (f" {minutes} min" if minutes and hours < 10 else "")


def head(study: StudyState, browse: str = "") -> list[Text]:
    """Return the lines that identify a study: its name, the classes of its split, and where to browse its runs."""
    title = Text.assemble(("study ", "dim"), (study.study, "bold"), no_wrap=True, overflow="ellipsis")
    if study.classes:
        counts = [f"{number} {word}" for part, word in _PARTS.items() if (number := study.classes.get(part, 0))]
        sealed = " (test sealed)" if study.classes.get("test") else ""
        title.append(f"  {study.dataset}: {' / '.join(counts)} classes{sealed}", "dim")
    return [title, *([Text.assemble(("MLflow ", "dim"), browse, no_wrap=True, overflow="ellipsis")] if browse else [])]


def stage_line(study: StudyState) -> Text:
    """Return how far each stage is: ``search 16/16 | confirm 3/8, 2 running | finalize waiting``."""
    text = Text(no_wrap=True, overflow="ellipsis")
    for number, stage in enumerate(name for name in STAGES if name in study.stages or name in study.planned):
        text.append(" | " if number else "", "dim")
        plan = study.stages.get(stage)
        if plan is None:
            text.append(f"{stage} waiting", "dim")
            continue
        trials = study.of_stage(stage)
        is_now = stage == study.stage and not plan.finished
        num_ended = study.num_tested if stage == "finalize" else sum(bool(trial.ended) for trial in trials)
        text.append(stage, "bold cyan" if is_now else "")
        text.append(" done" if plan.finished and stage == "finalize" else f" {num_ended}/{plan.num_trials}")
        num_running = sum(trial.state in ("running", "retrying") for trial in trials)
        if is_now and study.state == "interrupted":
            text.append(", interrupted", "yellow")
        elif is_now and num_running:
            text.append(f", {num_running} running")
        if failed := sum(trial.state in FAILURES for trial in trials):
            text.append(f", {failed} failed", "red")
    return text


_ROOM_FOR_SEARCH = 16  # lines of a terminal from which a line is spared for the searcher


def search_text(study: StudyState) -> str:
    """Return ``tpe with asha: best MAP@R 0.8049, 26 trials to come``; empty before the first trial."""
    plan, trials = study.stages.get("search"), study.of_stage("search")
    if plan is None or plan.finished or not trials:
        return ""
    search = study.config.get("search") or {}
    searcher = (search.get("searcher") or {}).get("name", "random")
    best, to_come = study.best_of_stage("search"), max(plan.num_trials - len(trials), 0)
    found = f"best {metric_label(study.metric)} {best.best:.4f}, " if best and best.best else ""
    scheduler = search.get("scheduler", "none")
    how = searcher if scheduler == "none" else f"{searcher} with {scheduler}"
    return f"{how}: {found}{counted(to_come, 'trial') if to_come else 'no trial'} to come"


def step_text(study: StudyState, doing: str = "", now_s: float | None = None) -> str:
    """Return what is done beside training, ``step 6 of 8: drawing the pictures (12 s)``; empty while trials run."""
    if doing or study.step is None:
        return doing
    step = study.step
    waited_s = 0.0 if now_s is None else now_s - step.started_s
    count = f"step {step.number} of {step.total}: " if step.total else ""
    return f"{count}{step.name}" + (f" ({waited_s:.0f} s)" if waited_s >= 2 else "")


def view(
    study: StudyState,
    *,
    width: int,
    height: int,
    elapsed_s: float = 0.0,
    before_s: float = 0.0,
    left_s: float | None = None,
    browse: str = "",
    doing: str = "",
    stopping: str = "",
    now_s: float | None = None,
) -> RenderableType:
    """Return the whole view for a terminal of ``width`` x ``height`` characters; it never exceeds the height.

    elapsed_s, before_s, left_s: seconds of this run of the study, of earlier ones, and to its end where they can be
    estimated. browse: where the runs can be browsed. doing: what is done before the first event. stopping: that a
    signal has arrived, in words. now_s: seconds since 1970, for the age of the step.
    """
    notes = dict.fromkeys(study.notes)  # a resumed study repeats them
    parts: list[RenderableType] = [Text(note, style="dim", no_wrap=True, overflow="ellipsis") for note in notes]
    parts += head(study, browse) if study.study else []
    if study.stages or study.planned:
        parts.append(stage_line(study))
    trials = study.of_stage(study.stage)
    below: list[RenderableType] = []
    if study.stage == "search" and height >= _ROOM_FOR_SEARCH and (words := search_text(study)):
        below.append(Text(words, style="dim", no_wrap=True, overflow="ellipsis"))
    if study.stage == "confirm" and (means := confirmed_means(study)):
        below.append(Text(means, no_wrap=True, overflow="ellipsis"))
    step = step_text(study, doing, now_s)
    if stopping:
        below.append(Text(stopping, style="bold yellow"))
    elif step:
        below.append(Text(step, style="cyan", no_wrap=True, overflow="ellipsis"))
    if study.study:
        below.append(_bar(width, elapsed_s, before_s, left_s, study.time_limit_s))
    if trials:
        limit = max(height - len(parts) - len(below) - 3, 2)
        parts.append(trial_table(study, study.stage, width=width, limit=limit))
        hidden = len(trials) - min(limit, len(trials))
        if hidden:
            parts.append(Text(f"... and {hidden} more trials that are not among the best", style="dim"))
    return Group(*parts, *below)


def _bar(width: int, elapsed_s: float, before_s: float, left_s: float | None, limit_s: float | None) -> RenderableType:
    """Return one bar for the whole study: the share of its time that is over."""
    words = f"{duration(elapsed_s)} elapsed"
    words += "" if left_s is None else f", {rough_time(left_s)} left"
    words += f", limit {duration(limit_s)}" if limit_s is not None else ""
    bar = Table.grid(padding=(0, 2))
    over_s = before_s + elapsed_s
    share = 0.0 if left_s is None else over_s / max(over_s + left_s, 1e-9)
    bar.add_row(ProgressBar(total=1.0, completed=share, width=max(min(width - len(words) - 8, 50), 8)), words)
    return bar


def line(study: StudyState, event: Event) -> str | None:
    """Return one plain line for an event, given the state after it; None for events without a line (every epoch)."""
    kind = event.get("event")
    if kind == "study_started":
        return ": ".join(text.plain.strip() for text in head(study))
    if kind == "step":
        return step_text(study)
    if kind == "stage_started":
        plan = study.stages[str(event["stage"])]
        epochs = counted(plan.max_epochs, "epoch") if plan.max_epochs else ""
        size = f": {counted(plan.num_trials, 'trial')} of at most {epochs}" if epochs else ""
        size = f": {counted(plan.num_trials, 'network')} to test" if plan.stage == "finalize" else size
        return f"{plan.stage}{size}"
    if kind == "stage_finished":
        return f"{event['stage']} finished{_won(study, str(event['stage']))}"
    if kind == "note":
        return f"note: {event.get('text', '')}"
    if kind in ("interrupted", "study_finished"):
        return f"study {study.study} {'interrupted' if kind == 'interrupted' else 'finished'}"
    if kind in ("trial_started", "trial_retried", "trial_ended"):
        return _trial_line(study, study.trials[str(event["trial"])], str(kind), str(event.get("reason") or ""))
    return None


def _won(study: StudyState, stage: str) -> str:
    """Return the best of a stage that has finished: a mean after a confirmation, else the best trial."""
    if stage == "confirm" and (means := confirmed_means(study)):
        return f": {means}"
    label = metric_label(study.metric)
    if stage == "search":
        first = best_searched(study)
        over = f" ({first.runs})" if first and first.runs != "1 run" else ""
        return f", best {first.trial} {label} {first.value:.4f}{over}" if first else ""
    best = study.best_of_stage(stage)
    return f", best {best.trial} {label} {best.best:.4f}" if best else ""


def _trial_line(study: StudyState, trial: TrialState, kind: str, reason: str) -> str:
    name = run_name(trial, {} if trial.stage == "search" else letters_of(study))
    if kind == "trial_started":
        details = [] if trial.stage != "search" else [f"dim {embedding_dim(trial)}", f"lr {learning_rate(trial)}"]
        if trial.num_epochs:
            details.append(f"from epoch {trial.num_epochs}")
        return f"{name} started: {', '.join([trial.recipe, *details])}"
    if kind == "trial_retried" and reason in MOVES:
        return f"{name} is started again after epoch {trial.num_epochs}: its node {MOVES[reason]}"
    error = (trial.retried_after if kind == "trial_retried" else trial.error or "").strip()
    why = f": {error.splitlines()[-1]}" if error else ""
    if kind == "trial_retried":
        return f"{name} failed after epoch {trial.num_epochs}, retry {trial.num_retries}{why}"
    state = ENDINGS[trial.state] if trial.state in LIMITS else trial.state.replace("_", " ")
    done = f"failed ({state})" if trial.state in FAILURES else state
    best = "" if trial.best is None else f", best {metric_label(study.metric)} {trial.best:.4f}"
    return f"{name} {done} after epoch {trial.num_epochs}/{trial.num_planned_epochs}{best}{why}"


_PARTS = {"train": "train", "val": "validation", "test": "test"}


class LiveStudy:
    """Shows a study while it runs: ``with LiveStudy(folder / "events.jsonl"): run_study(folder)``.

    Events before ``from_offset`` (bytes) are history, which one line summarises. A terminal redraws the view in place;
    elsewhere (a pipe, a log file, TERM=dumb) every event is one plain line with the elapsed time, without control
    codes. A signal is acknowledged at once, whatever the main thread waits for.
    """

    def __init__(
        self,
        events_path: Path,
        from_offset: int = 0,
        *,
        console: Console | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.console = console or Console()
        self.study = StudyState()  # of the newest reading: another thread draws it
        self._reduction = Reduction()
        self._path = events_path
        self._offset = 0
        self._history_ends = from_offset
        self._browse = ""
        self._clock = clock
        self._began_s = clock()
        self._doing, self._stopping = "", ""
        self._before_s = 0.0  # seconds of earlier runs
        self._next_estimate_s = 0.0
        self._left: tuple[float, float] | None = None  # estimated seconds to the end, and when they were estimated
        self._stop, self._reading = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._follow, name="live-study", daemon=True)
        self._live: Live | None = None
        self._around = contextlib.ExitStack()

    def __enter__(self) -> LiveStudy:
        self._replay_history()
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            self._live = Live(get_renderable=self._picture, console=self.console, refresh_per_second=4, transient=False)
            self._live.start()
        self._around.enter_context(signals_seen(self._acknowledge))
        self._around.enter_context(_steps_shown_by(self.doing))
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._around.close()
        self._stop.set()
        self._thread.join(timeout=5)
        self._read_on()
        self._doing = self._stopping = ""
        if self._live is not None:
            self._live.stop()

    def doing(self, text: str) -> None:
        """Show what is done until the next event."""
        self._read_on()
        if self._live is None and text.partition(":")[0] != self._doing.partition(":")[0]:
            self._say(text.partition(":")[0])
        self._doing = text

    def show(self, text: str) -> None:
        """Print a line of the study's process, above the view."""
        if text := re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text).strip():
            echo(self.console, text)

    def browse_with(self, text: str) -> None:
        """Show where the study's runs can be browsed: the command or the address of the MLflow UI."""
        self._browse = text
        if self._live is None:
            self._say(f"MLflow: {text}")

    def left_s(self) -> float | None:
        """Return the estimated seconds to the end of the study; None before there is an estimate."""
        if self._left is None:
            return None
        estimated_s, then_s = self._left
        return max(estimated_s - (self._clock() - then_s), 0.0)

    def _acknowledge(self, _number: int) -> None:
        self._stopping = STOPPING_NOW if self._stopping else STOPPING
        if self._live is None:
            self._say(self._stopping)
        else:
            self._live.refresh()

    def _say(self, text: str) -> None:
        echo(self.console, f"[{duration(self._clock() - self._began_s)}] {text}")

    def _replay_history(self) -> None:
        if not self._history_ends:
            return
        history, self._offset = events.read_from(self._path, until=self._history_ends)
        for event in history:
            self._reduction.add(event)
        self.study = self._reduction.copy()
        self._before_s = self.study.active_s
        ended = sum(bool(trial.ended) for trial in self.study.trials.values())
        epochs = sum(trial.num_epochs for trial in self.study.trials.values())
        started = f"{ended} of {len(self.study.trials)} started trials have ended"
        echo(self.console, f"resuming {self.study.study}: {started}, {epochs} epochs are done")

    def _follow(self) -> None:
        while not self._stop.wait(POLL_S):
            self._read_on()

    def _read_on(self) -> None:
        with self._reading:
            self._read_new()

    def _read_new(self) -> None:
        new, self._offset = events.read_from(self._path, self._offset)
        before = self.study
        for event in new:
            self._reduction.add(event)
            study = self._reduction.now()
            if study.stage != before.stage or study.step is not before.step:
                self._doing = ""
            text = line(study, event)
            if self._live is None and text:
                self._say(text)
            before = study
        if new:
            self.study = self._reduction.copy()
        now_s = self._clock()
        if new and now_s >= self._next_estimate_s:
            if (left_s := remaining_s(self.study)) is not None:
                self._left = (left_s, now_s)
            self._next_estimate_s = now_s + (self._clock() - now_s) / ESTIMATE_SHARE

    def _picture(self) -> RenderableType:
        size, now_s = self.console.size, self._clock()
        return view(
            self.study,
            width=size.width,
            height=size.height,
            elapsed_s=now_s - self._began_s,
            before_s=self._before_s,
            left_s=0.0 if self.study.state == "finished" else self.left_s(),
            browse=self._browse,
            doing=self._doing,
            stopping=self._stopping,
            now_s=now_s,
        )


@contextlib.contextmanager
def signals_seen(call: Callable[[int], None]) -> Iterator[None]:
    """Call a function, in a thread of its own, with the number of each of STOP_SIGNALS that arrives.

    Python runs a signal's handler only when the main thread gets back to Python, which can take as long as Ray needs to
    start. The wakeup descriptor is written at once. Outside the main thread nothing is called.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)

    def listen() -> None:
        while numbers := ours.recv(64):
            for number in numbers:
                if number in STOP_SIGNALS:
                    call(number)

    listener = threading.Thread(target=listen, name="signals-seen", daemon=True)
    listener.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        theirs.close()  # ends the thread
        listener.join(timeout=5)
        ours.close()


@contextlib.contextmanager
def _steps_shown_by(show: Callable[[str], None]) -> Iterator[None]:
    """Show the progress of long steps by a function instead of by bars, which would disturb a live view."""
    logger = logging.getLogger("raydml.progress")
    bars = [handler for handler in logger.handlers if isinstance(handler, StepBars)]
    steps = _StepTexts(show)
    for handler in bars:
        logger.removeHandler(handler)
    logger.addHandler(steps)
    try:
        yield
    finally:
        logger.removeHandler(steps)
        for handler in bars:
            logger.addHandler(handler)


class _StepTexts(logging.Handler):
    """Passes the progress of long steps on as texts: ``decoding: 3,120 of 11,788 images``."""

    def __init__(self, show: Callable[[str], None]) -> None:
        super().__init__(level=logging.DEBUG)
        self._show = show

    def emit(self, record: logging.LogRecord) -> None:
        step = progress_of(record)
        if step is not None and not step.ended:
            total = "" if step.total is None else f" of {step.total:,}"
            self._show(f"{step.name}: {step.done:,}{total} {step.unit}")


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
