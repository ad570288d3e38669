"""The one engine of a run: started on the first checkpoint, moved to the next ones, closed."""

from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_bio.checkpoint.source import resolve
from mergekit_bio.engine.interface import Engine, EngineSettings
from mergekit_bio.engine.sweep import family

if TYPE_CHECKING:
    from mergekit_bio.engine.prefix_cache import PrefixCache


class EngineSlot:
    """Holds one engine at a time; use as a context manager.

    Args:
        engine: Its class, of :func:`mergekit_bio.engine.choice.choose_engine`.
        settings: What it is started with.

    Attributes:
        name: The engine's.
        settings: As given.
        notes: What a user should know about the prefixes.

    Raises:
        EngineError: The engine has no such option.
    """

    def __init__(self, engine: type[Engine], settings: EngineSettings) -> None:
        engine.set_environment(quiet=settings.quiet)
        engine.check_options(settings.options)
        self.name = engine.name
        self.settings = settings
        self.notes: list[str] = []
        self._class = engine
        self._engine: Engine | None = None
        self._family: str | None = None
        self._encoded_before = 0

    def __enter__(self) -> "EngineSlot":
        return self

    def __exit__(self, *exception: object) -> None:
        self._close()

    @property
    def prefixes(self) -> "PrefixCache | None":
        """Where the engine's audio prefixes come from; None where there is none, or it makes its own."""
        return self._engine.prefixes if self._engine else None

    @property
    def encoded(self) -> int:
        """Clips that went through an audio tower so far."""
        return self._encoded_before + (self.prefixes.encoded if self.prefixes else 0)

    def at(self, checkpoint: str | Path) -> Engine:
        """The engine, on this checkpoint.

        Args:
            checkpoint: A directory or hub id, or the name that servers know it by.

        Raises:
            EngineError: It cannot run it.
        """
        if self._class.remote:
            return self._at(str(checkpoint), family_of_it="")
        path = resolve(checkpoint).path
        return self._at(str(path), family_of_it=family(path))

    def _at(self, checkpoint: str, *, family_of_it: str) -> Engine:
        # Checkpoints of one family differ in a few tensors, which are replaced; any other needs an engine of its own.
        if self._engine is not None and self._family == family_of_it:
            try:
                self._engine.load(checkpoint)
            except BaseException:
                self._close()  # it may be closed already; whoever asks next gets one that starts anew
                raise
            return self._engine
        self._close()
        self._engine, self._family = self._class.start(checkpoint, self.settings), family_of_it
        return self._engine

    def revision(self, checkpoint: str) -> str:
        """What tells the weights of a checkpoint from others, as servers say it."""
        return self.at(checkpoint).load(checkpoint)

    def flush(self) -> None:
        """Wait until all prefixes are on disk, or say why they are not."""
        if self.prefixes:
            self.prefixes.flush()
            if self.prefixes.problem and self.prefixes.problem not in self.notes:
                self.notes.append(self.prefixes.problem)

    def _close(self) -> None:
        if self._engine is not None:
            self.flush()
            self._encoded_before = self.encoded
            self._engine.close()
        self._engine = None
