"""Why one of vLLM's processes did not come up, for the process that started it: vLLM only says that it did not."""

import logging
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

#: Names the file that the first failure is written to.
_VARIABLE = "MERGEKIT_BIO_FIRST_FAILURE"


@contextmanager
def first_failure() -> Iterator[Callable[[], str | None]]:
    """Have the processes that are started in the block tell the first exception that any of them logs.

    Yields:
        What gives that exception's words; None where there was none.
    """
    with tempfile.TemporaryDirectory(prefix="mergekit-bio-start-") as folder:
        file = Path(folder) / "failure"
        os.environ[_VARIABLE] = str(file)
        try:
            yield lambda: file.read_text() if file.exists() else None
        finally:
            os.environ.pop(_VARIABLE, None)


def tell_failures() -> None:
    """Tell what this process, one of vLLM's, logs as an exception; called as soon as vLLM loads this package."""
    file, logger = os.environ.get(_VARIABLE), logging.getLogger("vllm")
    known = any(isinstance(handler, _Teller) for handler in logger.handlers)
    if file is not None and multiprocessing.parent_process() is not None and not known:
        logger.addHandler(_Teller(Path(file)))


class _Teller(logging.Handler):
    def __init__(self, file: Path) -> None:
        super().__init__(logging.ERROR)
        self._file = file

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if error is None:
            return
        words = " ".join(str(error).split())
        if not isinstance(error, ValueError | RuntimeError) or not words:
            words = f"{type(error).__name__}: {words}".removesuffix(": ")
        # The others fail because the first has; and whoever started them may be gone.
        with suppress(OSError), self._file.open("x") as file:
            file.write(words)
