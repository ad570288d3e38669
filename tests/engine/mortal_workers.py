"""Workers for tests of the pool: they are made, and die, in processes of Ray."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from mergekit_bio.errors import MissingPackageError

#: Jobs that do something else than to be done.
DEADLY, REFUSED = 5, 6


@dataclass
class Mortal:
    """Answers with the job and its process, or dies of a job, even of one that it reads ahead.

    Attributes:
        deadly: What it dies of; None for everything.
    """

    deadly: int | None

    def answer(self, job, following):
        time.sleep(0.02)
        if self.deadly is None or self.deadly in (job, following):
            os.kill(os.getpid(), signal.SIGKILL)
        if job == REFUSED:
            raise MissingPackageError("Sound", "ears", "hearing")
        return job, os.getpid()

    def close(self):
        pass


@dataclass
class Noting(Mortal):
    """Notes in a file that it was closed."""

    file: str = ""

    def close(self):
        with Path(self.file).open("a") as notes:
            notes.write(f"{os.getpid()}\n")
