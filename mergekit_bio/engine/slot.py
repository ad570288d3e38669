"""The one engine of a run: started on the first checkpoint, moved to the next ones, closed."""

from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_bio.checkpoint.source import resolve
from mergekit_bio.engine.interface import Engine, EngineSettings
from mergekit_bio.engine.sweep import family

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from mergekit_bio.audio.clip import Clip


class EngineSlot:
    """Holds one engine at a time; use as a context manager.

    Args:
        engine: Its class, of :func:`mergekit_bio.engine.choice.choose_engine`.
        settings: What it is started with.

    Attributes:
        name: The engine's.
        remote: Whether servers hear the clips, and need their samples.
        settings: As given.
        notes: What a user should know about the prefixes.

    Raises:
        EngineError: The engine has no such option.
    """

    def __init__(self, engine: type[Engine], settings: EngineSettings) -> None:
        engine.set_environment(quiet=settings.quiet)
        engine.check_options(settings.options)
        self.name, self.remote = engine.name, engine.remote
        self.settings = settings
        self.notes: list[str] = []
        self._class = engine
        self._engine: Engine | None = None
        self._family: str | None = None
        self._checkpoint: str | None = None
        self._encoded_before = 0

    def __enter__(self) -> "EngineSlot":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def encoded(self) -> int:
        """Clips that went through an audio tower so far."""
        prefixes = self._engine.prefixes if self._engine else None
        return self._encoded_before + (prefixes.encoded if prefixes else 0)

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
        if self._engine is not None and self._checkpoint == checkpoint:
            return self._engine
        self._checkpoint = None
        # Checkpoints of one family differ in a few tensors, which are replaced; any other needs an engine of its own.
        if self._engine is not None and self._family == family_of_it:
            try:
                self._engine.load(checkpoint)
            except BaseException:
                self.close()  # it may be closed already; whoever asks next gets one that starts anew
                raise
        else:
            self.close()
            self._engine, self._family = self._class.start(checkpoint, self.settings), family_of_it
        self._checkpoint = checkpoint
        return self._engine

    def revision(self, checkpoint: str) -> str:
        """What tells the weights of a checkpoint from others, as servers say it."""
        return self.at(checkpoint).load(checkpoint)

    def known(self, digests: "Iterable[str]") -> set[str]:
        """The digests of clips whose samples are not needed, because their prefixes are at hand.

        Before the engine is up, that is supposed of all.
        """
        if self.remote:
            return set()
        prefixes = self._engine.prefixes if self._engine else None
        return prefixes.known(digests) if prefixes else set(digests)

    def encode(self, clips: "Sequence[Clip]") -> None:
        """Have the prefixes of clips at hand, made in batches rather than one by one; not before the engine is up."""
        if self._engine is not None and self._engine.prefixes is not None:
            self._engine.prefixes(clips)

    def forget(self, clips: "Iterable[Clip]") -> None:
        """Free the memory of the prefixes of clips that are not asked about again."""
        if self._engine is not None and self._engine.prefixes is not None:
            self._engine.prefixes.forget(clip.digest for clip in clips)

    def flush(self) -> None:
        """Wait until all prefixes are on disk, or note why they are not."""
        if self._engine is not None and self._engine.prefixes is not None:
            self._engine.prefixes.flush()
            self.note_problem()

    def note_problem(self) -> None:
        """Note why prefixes could not be kept on disk, if they could not."""
        prefixes = self._engine.prefixes if self._engine else None
        if prefixes is not None and prefixes.problem and prefixes.problem not in self.notes:
            self.notes.append(prefixes.problem)

    def close(self) -> None:
        """Close the engine, if one is up; the next use starts another."""
        if self._engine is not None:
            self.flush()
            self._encoded_before = self.encoded
            self._engine.close()
        self._engine = None
