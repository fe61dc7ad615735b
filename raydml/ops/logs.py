"""What raydml says while it works: progress and warnings of long steps, on stderr."""

import logging
import sys


class _Stderr(logging.Handler):
    """Writes to whatever stderr is at that moment: tests and notebooks change it."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


def show_log() -> None:
    """Let raydml's own messages (level INFO and above) be seen; asking again changes nothing."""
    logger = logging.getLogger("raydml")
    logger.setLevel(logging.INFO)
    if not any(isinstance(handler, _Stderr) for handler in logger.handlers):
        logger.addHandler(_Stderr())
