"""Functions run in forked processes."""

import multiprocessing
from collections.abc import Callable
from typing import Any

FORK = multiprocessing.get_context("fork")


def run_children(child: Callable[..., None], num: int) -> list[tuple[int | None, Any]]:
    """Run child(queue) in `num` processes: the exit code of each, and the value that it put into its queue."""
    queues = [FORK.SimpleQueue() for _ in range(num)]
    processes = [FORK.Process(target=child, args=(queue,)) for queue in queues]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode is not None, "a child hangs"
    return [(p.exitcode, None if q.empty() else q.get()) for p, q in zip(processes, queues, strict=True)]
