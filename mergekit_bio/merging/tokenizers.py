"""Whose tokenizer a merge takes: the base's, or that of an adapter that brings new tokens."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mergekit_bio.adapter.interface import Adapter, Base
from mergekit_bio.checkpoint.directory import inside
from mergekit_bio.errors import AdapterError, CheckpointError
from mergekit_bio.merging.request import MergeRequest
from mergekit_bio.outside_data import read_json

#: What makes a folder's tokenizer one that can be taken: its vocabulary, in one of these files.
_VOCABULARIES = (
    "tokenizer.json", "tokenizer.model", "spiece.model", "spm*.model", "sentencepiece*.model", "*.spm", "vocab.json",
    "vocab.txt", "*.tiktoken", "tekken.json",
)  # fmt: skip
_SENTENCEPIECE = ("tokenizer.model", "spiece.model", "spm*.model", "sentencepiece*.model", "*.spm")
#: What decides how a conversation is written and where an answer ends.
_SETTINGS = ("chat_template", "bos_token", "eos_token", "pad_token", "unk_token")
_SHOWN = 3
_OTHERWISE = "the base's is taken (--tokenizer adapter for the other)"


@dataclass(frozen=True)
class TokenizerChoice:
    """Where the tokenizer of a merge comes from.

    Attributes:
        folder: The directory whose tokenizer files are taken, all of them.
        notes: What a user should know of it, one line each.
    """

    folder: Path
    notes: tuple[str, ...] = ()


def choose_tokenizer(
    request: MergeRequest, base: Base, adapters: Sequence[Adapter], rows: int | None
) -> TokenizerChoice:
    """Decide whose tokenizer files go along.

    Args:
        request: Its ``tokenizer`` says whose; ``"auto"`` is the base's, or that of an adapter that brings new tokens.
        base: The base.
        adapters: The adapters.
        rows: Of the result's embeddings, where that is known.

    Raises:
        AdapterError: An adapter's is asked for and there is none, or several bring different ones.
    """
    if request.tokenizer == "base":
        return TokenizerChoice(base.source.path)
    of_base = _Tokenizer(base.source.path)
    # 1. Find the adapters that have a tokenizer, what each brings, and whether the embeddings have rows for that.
    candidates = []
    for adapter in adapters:
        tokenizer = _Tokenizer(adapter.source.path)
        if tokenizer.complete:
            new = tokenizer.new_tokens(of_base)
            without_row = next((token for token in sorted(new) if rows and tokenizer.tokens[token] >= rows), None)
            candidates.append(_Candidate(adapter.source.name, tokenizer, new, without_row))
    # 2. Choose one.
    if request.tokenizer == "adapter":
        if not candidates:
            raise AdapterError(f"--tokenizer adapter: {adapters[0].source.given} holds no tokenizer; take the base's")
        chosen = _the_one(candidates)
    else:
        chosen = _the_one([candidate for candidate in candidates if candidate.new and not candidate.without_row])
    # 3. Say what differs.
    notes = []
    for candidate in candidates:
        tokenizer, differing = candidate.tokenizer, candidate.tokenizer.differences(of_base)
        if candidate.without_row and candidate is not chosen:
            token = candidate.without_row
            notes.append(
                f"{candidate.name}: its tokenizer has {token!r} as number {tokenizer.tokens[token]}, but the "
                f"embeddings have {rows} rows; the base's is taken"
            )
        elif candidate.new or differing:
            what = " and ".join(part for part in (_count(candidate.new), ", ".join(differing)) if part)
            if candidate is chosen:
                fate = "it is taken (--tokenizer base for the other)"
            else:
                fate = f"that of {chosen.name} is taken" if chosen else _OTHERWISE
            notes.append(f"{candidate.name}: its tokenizer differs from the base's in {what}; {fate}")
    return TokenizerChoice(chosen.tokenizer.folder if chosen else base.source.path, tuple(notes))


@dataclass(frozen=True)
class _Candidate:
    """An adapter's tokenizer.

    Attributes:
        name: The adapter's.
        tokenizer: Its tokenizer.
        new: The tokens that the base's lacks.
        without_row: One of them that the embeddings have no row for.
    """

    name: str
    tokenizer: "_Tokenizer"
    new: set[str]
    without_row: str | None


def _the_one(candidates: Sequence[_Candidate]) -> _Candidate | None:
    """The one whose tokenizer has all that the others' have; None where there are no candidates."""
    for candidate in candidates:
        if all(other.tokenizer.tokens.items() <= candidate.tokenizer.tokens.items() for other in candidates):
            return candidate
    if candidates:
        names = " and ".join(candidate.name for candidate in candidates)
        raise AdapterError(f"{names}: each brings a tokenizer of its own; merge them in turn, or use --tokenizer base")
    return None


def _count(new: set[str]) -> str:
    if not new:
        return ""
    shown = ", ".join(repr(token) for token in sorted(new)[:_SHOWN])
    return f"{len(new)} new token{'s' * (len(new) > 1)} ({shown}{', ...' if len(new) > _SHOWN else ''})"


@dataclass(frozen=True)
class _Tokenizer:
    """The tokenizer files of a folder, read as far as they are JSON, text or SentencePiece."""

    folder: Path

    @property
    def complete(self) -> bool:
        return any(True for pattern in _VOCABULARIES for _ in self._files(pattern))

    def new_tokens(self, base: "_Tokenizer") -> set[str]:
        """The tokens that the base's lacks."""
        if self._same_files(base):
            return set()
        if base.complete and not (self.vocabulary and base.vocabulary):  # one of them is in a format not read here
            return self.added.keys() - base.tokens.keys()
        return self.tokens.keys() - base.tokens.keys()

    def differences(self, base: "_Tokenizer") -> list[str]:
        """The settings in which it differs from the base's, such as ``"chat_template"``."""
        if not base.complete:
            return []
        return [name for name in _SETTINGS if self.settings.get(name) != base.settings.get(name)]

    @cached_property
    def tokens(self) -> dict[str, int]:
        """Every token -> its number."""
        return self.vocabulary | self.added

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """The tokens that the tokenizer was trained with; none where they are in a format not read here."""
        with self._explained("vocabulary is"):
            if isinstance(model := self._tokenizer_json.get("model"), dict):
                vocabulary = model.get("vocab") or {}
                if isinstance(vocabulary, list):  # Unigram: pairs of a piece and its score
                    return {str(piece): number for number, (piece, _) in enumerate(vocabulary)}
                return {token: int(number) for token, number in vocabulary.items()}
            if vocabulary := self._json("vocab.json"):
                return {token: int(number) for token, number in vocabulary.items()}
        for file in self._files("vocab.txt"):
            lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
            return {token: number for number, token in enumerate(lines)}
        for file in (file for pattern in _SENTENCEPIECE for file in self._files(pattern)):
            return {piece: number for number, piece in enumerate(_pieces(file.read_bytes()))}
        return {}

    @cached_property
    def added(self) -> dict[str, int]:
        """The tokens that were added to the vocabulary."""
        listed = self._tokenizer_json.get("added_tokens") or ()
        decoder = self._json("tokenizer_config.json").get("added_tokens_decoder") or {}
        with self._explained("added tokens are"):
            added = {str(token["content"]): int(token["id"]) for token in listed}
            added |= {token: int(number) for token, number in self._json("added_tokens.json").items()}
            return added | {str(token["content"]): int(number) for number, token in decoder.items()}

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """What reading a damaged file raises while the block runs, in one line."""
        try:
            yield
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{self.folder}: its {what} not listed as a tokenizer's are; save it again, or use --tokenizer base"
            ) from error

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Chat template and special tokens, as texts."""
        found = self._json("special_tokens_map.json") | self._json("chat_template.json")
        found |= {name: value for name, value in self._json("tokenizer_config.json").items() if name in _SETTINGS}
        for file in self._files("chat_template.jinja"):
            found["chat_template"] = file.read_text(encoding="utf-8", errors="replace")
        texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in found.items()}
        return {name: value.strip() if isinstance(value, str) else value for name, value in texts.items()}

    @cached_property
    def _tokenizer_json(self) -> dict[str, Any]:
        return self._json("tokenizer.json")

    def _same_files(self, other: "_Tokenizer") -> bool:
        """Whether vocabulary and added tokens are in the same files, byte for byte: the large ones need no reading."""
        names = [{file.name: file for pattern in (*_VOCABULARIES, "added_tokens.json", "tokenizer_config.json")
                  for file in tokenizer._files(pattern)} for tokenizer in (self, other)]  # fmt: skip
        return names[0].keys() == names[1].keys() and all(
            file.stat().st_size == names[1][name].stat().st_size and file.read_bytes() == names[1][name].read_bytes()
            for name, file in names[0].items()
        )

    def _json(self, name: str) -> dict[str, Any]:
        return read_json(inside(self.folder, name)) if (self.folder / name).is_file() else {}

    def _files(self, pattern: str) -> Iterator[Path]:
        yield from (inside(self.folder, file.name) for file in sorted(self.folder.glob(pattern)) if file.is_file())


def _pieces(model: bytes) -> Iterator[str]:
    """The pieces of a SentencePiece model, a protobuf message (sentencepiece_model.proto: field 1, and its field 1)."""
    for number, piece in _fields(model):
        if number == 1:
            yield next((text.decode(errors="replace") for inner, text in _fields(piece) if inner == 1), "")


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of each field of a protobuf message; a field that is a number has none."""
    place = 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while place < len(message):
            byte = message[place]
            value, shift, place = value | (byte & 0x7F) << shift, shift + 7, place + 1
            if byte < 0x80:
                break
        return value

    while place < len(message):
        number, kind = divmod(varint(), 8)
        start = place
        if kind == 0:
            varint()
            start = place
        elif kind == 2:
            count = varint()
            start, place = place, place + count
        else:  # 8 or 4 bytes
            place += 8 if kind == 1 else 4
        yield number, message[start:place]
