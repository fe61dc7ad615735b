"""Reading on a thread of its own, some steps ahead of whoever uses what was read."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

Result = TypeVar("Result")


def read_ahead(
    read: Callable[..., Result], calls: Iterable[tuple[Any, ...]], *, num_ahead: int
) -> Generator[Result, None, None]:
    """``read(*call)`` for each of these calls, in order, while the results before it are used.

    num_ahead: how many are read, or about to be, while one is used; at least 1. An error of a call is raised at its
    place. The thread ends with the generator: at its end, at an error, and when it is closed.
    """
    reader = ThreadPoolExecutor(1, thread_name_prefix="raydml-read")
    try:
        ahead: deque[Future[Result]] = deque()
        for call in calls:
            ahead.append(reader.submit(read, *call))
            if len(ahead) > num_ahead:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        reader.shutdown(wait=True, cancel_futures=True)
