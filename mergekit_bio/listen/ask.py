"""Questions about recordings, answered by a merged model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from mergekit_bio.audio.clip import Clip
from mergekit_bio.audio.recording import read_clip, read_windows
from mergekit_bio.model.modeling import NatureLMAudioForConditionalGeneration
from mergekit_bio.model.processing import NatureLMAudioProcessor

#: Windows of one recording that are answered at a time: they bound the memory a long one takes.
_BATCH = 4


@dataclass(frozen=True)
class Answer:
    """What the model said.

    Attributes:
        recordings: The files it was asked about, in the order of the prompt's slots.
        start: Where in the recording its window begins, in seconds, and ``end`` where it ends.
    """

    recordings: tuple[str, ...]
    start: float
    end: float
    text: str


@dataclass(frozen=True)
class Asker:
    """A model with the way it is asked: how many beams (1 is greedy), and how many tokens an answer may have."""

    model: NatureLMAudioForConditionalGeneration
    processor: NatureLMAudioProcessor
    num_beams: int
    max_new_tokens: int

    def each_window(
        self, recording: Path, instruction: str, *, window: float, hop: float | None = None
    ) -> Iterator[Answer]:
        """Ask about every window of a recording, a clip of 10 s for each.

        Raises:
            AudioError: The recording is no use.
            PromptError: The instruction is empty or has several slots.
        """
        prompt = self.processor.render(instruction)
        windows = read_windows(recording, window=window, hop=hop)
        while clips := list(islice(windows, _BATCH)):
            texts = self._generate([prompt] * len(clips), clips)
            for clip, text in zip(clips, texts, strict=True):
                yield Answer((str(recording),), clip.start, clip.end, text)

    def together(self, recordings: Sequence[Path], instruction: str) -> Answer:
        """Ask once about several recordings, the first 10 s of each, one a slot of the instruction.

        Raises:
            AudioError: A recording is no use.
            PromptError: The recordings are not as many as the slots.
        """
        prompt = self.processor.render(instruction, num_audios=len(recordings))
        clips = [read_clip(recording) for recording in recordings]
        (text,) = self._generate([prompt], clips)
        return Answer(tuple(map(str, recordings)), 0.0, max(clip.end for clip in clips), text)

    def _generate(self, prompts: list[str], clips: Sequence[Clip]) -> list[str]:
        inputs = self.processor(prompts, audio=list(clips)).to(self.model.device)
        ids: Any = self.model.generate(
            **inputs,
            do_sample=False,
            temperature=None,
            top_p=None,
            num_beams=self.num_beams,
            max_new_tokens=self.max_new_tokens,
            pad_token_id=self.processor.pad_token_id,
        )
        answers = ids[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.processor.batch_decode(answers, skip_special_tokens=True)]
