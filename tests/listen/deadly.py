"""A worker that dies of one recording: it is made, and dies, in a process of Ray."""

import os
import signal

from mergekit_bio.listen.asking import Answer, AnsweredWindow
from mergekit_bio.listen.reading import Ended
from mergekit_bio.listen.stretches import Heard

DEADLY = "deadly.wav"


class Deadly:
    def __init__(self, *given):
        pass

    def answer(self, stretch, following):
        if any(recording.path.endswith(DEADLY) for recording in stretch.recordings):
            os.kill(os.getpid(), signal.SIGKILL)
        paths = [recording.path for recording in stretch.recordings]
        windows = tuple(AnsweredWindow(path, 0, 0.0, 3.0, Answer("a wren")) for path in paths)
        return Heard(windows, tuple(Ended(path, 3.0, 16_000) for path in paths), None, 0.1)

    def close(self):
        pass
