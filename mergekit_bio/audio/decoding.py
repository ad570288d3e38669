"""Recordings to samples: block by block, each file by the library that hears all of it.

- libsndfile decodes WAV, AIFF, AU, CAF and their relatives, and Ogg, a chained part at a time. (FFmpeg gives other
  lengths for some Ogg Vorbis, and for Opus other samples.)
- FFmpeg (PyAV) decodes everything else, and a WAV whose header says less than there is. It goes packet by packet, so
  that a damaged one is left out and what follows is heard.

Where both decode a file their samples are the same: bit by bit for PCM and FLAC.
"""

import errno
import math
import os
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import FileIO
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_bio.audio.byte_source import ByteSource
from mergekit_bio.audio.clip import CLIP_SECONDS
from mergekit_bio.audio.file_kind import HEAD_BYTES, what_else
from mergekit_bio.audio.sample_sizes import SampleSize, sample_size
from mergekit_bio.audio.wav_chunks import WavLength, wav_length
from mergekit_bio.audio.waveform import check_rate
from mergekit_bio.errors import AudioError, MissingPackageError

if TYPE_CHECKING:
    import numpy as np

#: Hears a sentence about what was heard otherwise than a file's header says.
Note = Callable[[str], None]

#: Frames of a block: ten seconds at 52 kHz. So an hour of ultrasound takes no more memory than a clip.
_BLOCK_FRAMES = 1 << 19
#: And samples of it, of all channels: 32 MB.
_BLOCK_SAMPLES = 1 << 22

#: What FFmpeg may take a file for: containers that hold all they need. Playlists, which make it open other files and
#: addresses, are none, nor are pictures and texts.
_CONTAINERS = (
    "aac,ac3,adx,aiff,amr,amrnb,amrwb,ape,asf,au,avi,caf,dsf,dts,dtshd,eac3,flac,flv,iff,ircam,matroska,mov,mp3,mpc,mpc8,"
    "mpeg,mpegts,nistsphere,ogg,oma,rm,sox,tak,truehd,tta,voc,w64,wav,wv,xwma"
)
#: Of these, those whose header says nothing about their length: FFmpeg guesses it.
_HEADERLESS = {"aac", "ac3", "amr", "amrnb", "amrwb", "dts", "eac3", "mpeg", "mpegts", "truehd", "voc"}

#: FFmpeg's sample formats, without the "p" of planar ones -> the value of silence, and of full scale above it.
_SCALES = {"u8": (128, 128.0), "s16": (0, 2.0**15), "s32": (0, 2.0**31), "flt": (0, 1.0), "dbl": (0, 1.0)}

#: How files begin that libsndfile decodes, beside Ogg.
_LIBSNDFILES = (b"RIFF", b"RF64", b"BW64", b"FORM", b".snd", b"caff", b"riff")
#: Seconds behind the end of a file by its header that are worth to be heard, or to be spoken of.
_LEAST_MISSED = 0.1
#: libsndfile's number for an error of the system's (SF_ERR_SYSTEM).
_SYSTEM_ERROR = 2
#: Seconds by which a lossy encoder's frames may differ from what the header says without a note, and a lossless one's.
_LOSSY_TOLERANCE, _LOSSLESS_TOLERANCE = 0.25, 0.01


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive samples of a recording: float64 ``[frames, channels]``, full scale is 1; and their rate in Hz."""

    samples: "np.ndarray[Any, Any]"
    rate: int


def decode(path: Path, *, note: Note, start: float = 0.0) -> Iterator[Block]:
    """Decode a recording from a place to its end, a few seconds at a time.

    Args:
        path: Any file; it is recognised by its content.
        note: Is told, in words that go behind the file's name, how what is heard differs from what the header says.
        start: Seconds that are left out; the sample ``round(start * rate)`` is the first.

    Raises:
        AudioError: The file is no recording, or breaks: what was decoded until then has been given. No file is named.
        OSError: It cannot be read.
    """
    # Without a buffer, because libsndfile reads on where the descriptor stands.
    with path.open("rb", buffering=0) as file:
        head = file.read(HEAD_BYTES)
        if head[:4] == b"OggS":
            yield from _skipped(_ogg(path, file, note), start)
            return
        # Where a WAV's header says less than there is, FFmpeg reads on to the end of the file.
        wav = wav_length(file)
        stale = _is_stale(wav)
        if head[:4] in _LIBSNDFILES and not stale:
            sizes = sample_size(file)
            with _libsndfile(_mended(file, sizes)) as sound:
                if _is_libsndfiles(sound):
                    yield from _libsndfile_blocks(sound, round(start * sound.samplerate))
                    if text := _otherwise(sound, wav, sizes):
                        note(text)
                    return
    yield from _skipped(_ffmpeg(path, note, wav.stated if stale else None), start)


def begins_anywhere(path: Path) -> bool:
    """Whether :func:`decode` begins at a place without decoding what lies before it."""
    try:
        with path.open("rb", buffering=0) as file:
            head = file.read(HEAD_BYTES)
            return head[:4] in _LIBSNDFILES and not _is_stale(wav_length(file))
    except OSError:  # whoever decodes it says so
        return True


def stated_length(path: Path) -> tuple[int, float]:
    """A recording's rate in Hz and its seconds, without decoding it: by its header, or by its size where that is stale.

    Both are 0 where nothing tells, as of a file that is no recording, or without the package that would.
    """
    try:
        with path.open("rb", buffering=0) as file:
            head = file.read(HEAD_BYTES)
            wav = wav_length(file)
            stale = _is_stale(wav)
            if head[:4] == b"OggS" and (length := _ogg_length(file)) is not None:
                return length
            if head[:4] in _LIBSNDFILES:
                with _libsndfile(_mended(file, sample_size(file))) as sound:
                    if _is_libsndfiles(sound):
                        return sound.samplerate, wav.there if stale else sound.frames / sound.samplerate
        with _opened(_pyav(f"decoding {path.name}"), path, to_the_end=False) as (container, _):
            stream = container.streams.best("audio")
            if stream is None or stream.codec_context is None:
                return 0, 0.0
            return stream.rate, wav.there if stale else _stated_seconds(container, stream, path)[0] or 0.0
    except (OSError, AudioError, MissingPackageError):
        return 0, 0.0


def _skipped(blocks: Iterator[Block], start: float) -> Iterator[Block]:
    """The blocks without the first seconds."""
    before, frames, rate = 0.0, 0, 0  # seconds of other rates, and frames of this one
    for block in blocks:
        if block.rate != rate:
            before, frames, rate = before + (frames / rate if rate else 0.0), 0, block.rate
        left_out = min(max(0, round((start - before) * rate) - frames), len(block.samples))
        frames += len(block.samples)
        if left_out < len(block.samples):
            yield Block(block.samples[left_out:], block.rate)


def _block_frames(rate: int, channels: int) -> int:
    return max(1, min(int(CLIP_SECONDS * rate), _BLOCK_FRAMES, _BLOCK_SAMPLES // channels))


def _is_stale(wav: WavLength) -> bool:
    return wav.stated < wav.there - _LEAST_MISSED


def _differs(stated: float, heard: float) -> str:
    """The note on a recording that is longer or shorter than its header says, in seconds; 0 where it says nothing."""
    says = f"says {stated:.2f} s" if 0 < stated < math.inf else "states no length"
    return f"its header {says}; {heard:.2f} s are heard"


# ---- libsndfile


def soundfile() -> Any:
    """The ``soundfile`` package.

    Raises:
        MissingPackageError: It, or its C library, is not installed.
    """
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: the package without its C library
        raise MissingPackageError("soundfile", "eval", "reading recordings") from error
    return soundfile


@contextmanager
def _libsndfile(file: FileIO | ByteSource) -> Iterator[Any]:
    """A file as a ``soundfile.SoundFile``; None where libsndfile does not know it."""
    library = soundfile()
    file.seek(0)
    try:
        # By descriptor, which is faster than through Python.
        sound = library.SoundFile(file if isinstance(file, ByteSource) else file.fileno(), closefd=False)
    except library.SoundFileError:
        _check(file)
        yield None
        return
    with sound:
        try:
            yield sound
        except Exception:
            _check(file)
            raise
        _check(file)


def _check(file: FileIO | ByteSource) -> None:
    if isinstance(file, ByteSource):
        file.check()


def _is_libsndfiles(sound: Any) -> bool:
    """Whether libsndfile decodes all of an opened file."""
    return sound is not None and sound.frames > 0 and not sound.subtype.startswith("MPEG")


def _mended(file: FileIO, sizes: SampleSize | None) -> FileIO | ByteSource:
    """A file as libsndfile hears it to its end."""
    return ByteSource(file, instead=sizes.mended) if sizes is not None and sizes.mended[1] else file


def _otherwise(sound: Any, wav: WavLength, sizes: SampleSize | None) -> str:
    """How what libsndfile hears of a file differs from its header; empty where it does not."""
    heard = there = sound.frames / sound.samplerate
    stated, zeros = heard * _stated_share(sound), 0.0
    if wav.there:
        stated, there, zeros = wav.stated, wav.there, wav.zeros
    elif sizes is not None and sizes.zeros:
        zeros = heard * (sizes.there / sizes.stated - 1)
    elif sizes is not None:
        stated = heard * sizes.stated / sizes.there
    if zeros > _LEAST_MISSED:
        return f"{zeros:.2f} s of zeros behind the {heard:.2f} s that its header says are left out"
    if stated > there + _LOSSLESS_TOLERANCE or stated < there - _LEAST_MISSED:
        return _differs(stated, heard)
    return ""


def _libsndfile_blocks(sound: Any, first: int = 0) -> Iterator[Block]:
    """The blocks of a ``soundfile.SoundFile`` from a frame on."""
    check_rate(sound.samplerate)
    if first and not sound.seekable():  # some codecs: GSM, say
        yield from _skipped(_libsndfile_blocks(sound), first / sound.samplerate)
        return
    frames = _block_frames(sound.samplerate, sound.channels)
    try:
        if first:
            sound.seek(min(first, sound.frames))
        while len(samples := sound.read(frames, dtype="float64", always_2d=True)):
            yield Block(samples, sound.samplerate)
    except soundfile().SoundFileError as error:
        if getattr(error, "code", 0) == _SYSTEM_ERROR:  # which one it does not say
            raise OSError(errno.EIO, os.strerror(errno.EIO)) from error
        raise AudioError(f"cannot be decoded further ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    return str(getattr(error, "error_string", error)).rstrip(".")  # without the number of the descriptor


def _stated_share(sound: Any) -> float:
    """How many times as much as there is a header says, by libsndfile's log."""
    sizes = re.findall(r"(\d+) \(should be ([1-9]\d*)\)", sound.extra_info)
    return max((int(stated) / int(there) for stated, there in sizes), default=1.0)


# ---- Ogg


def _ogg(path: Path, file: FileIO, note: Note) -> Iterator[Block]:
    """The blocks of an Ogg file, of all streams that are chained in it one after the other (RFC 3533)."""
    parts, of_first, heard = 0, 0.0, 0.0
    following: int | None = 0
    try:
        while following is not None:
            with _libsndfile(ByteSource(file, following) if parts else file) as sound:
                if sound is None and parts:
                    raise AudioError("a part that is chained to it cannot be decoded")
                if sound is None:
                    yield from _ffmpeg(path, note)  # Speex, or a video's sound
                    return
                parts += 1
                for block in _libsndfile_blocks(sound):
                    heard += len(block.samples) / block.rate
                    yield block
            of_first = of_first or heard
            following = _next_chained(file, following)
    finally:
        if parts > 1:
            several = f"{parts} Ogg streams are" if following is None else "more than one Ogg stream is"
            total = f"; {heard:.2f} s are heard" if following is None else ""
            note(f"{several} chained in it, the first of {of_first:.2f} s{total}")


def _ogg_length(file: FileIO) -> tuple[int, float] | None:
    """The rate in Hz of the first stream of an Ogg file, and the seconds of all; None where libsndfile knows none."""
    starts: list[int | None] = [0]
    while starts[-1] is not None:
        starts.append(_next_chained(file, starts[-1]))
    rate, seconds = 0, 0.0
    for start, end in pairwise(starts):
        assert start is not None
        # Each by itself: libsndfile has no length of one that streams of another rate follow.
        with _libsndfile(ByteSource(file, start, end)) as sound:
            if sound is None:
                break
            rate = rate or sound.samplerate
            seconds += sound.frames / sound.samplerate
    return (rate, seconds) if rate else None


def _next_chained(file: FileIO, position: int) -> int | None:
    """Where the next stream begins behind the one that begins at ``position``: a first page behind one that is none."""
    first_pages = True
    file.seek(position)
    while len(header := file.read(27)) == 27:
        if header[:4] != b"OggS":
            # Damage: on to the next page.
            rest = header + file.read(1 << 16)
            found = rest.find(b"OggS", 1)
            position += found if found > 0 else max(1, len(rest) - 3)
            file.seek(position)
            continue
        if header[5] & 2 and not first_pages:
            return position
        first_pages = bool(header[5] & 2)
        position += 27 + header[26] + sum(file.read(header[26]))
        file.seek(position)
    return None


# ---- FFmpeg


def _pyav(purpose: str) -> Any:
    try:
        import av
    except ImportError as error:
        raise MissingPackageError("av", "eval", purpose) from error
    return av


def _ffmpeg(path: Path, note: Note, stated: float | None = None) -> Iterator[Block]:
    """The blocks of a file by FFmpeg, without packets that are damaged.

    Args:
        path: The file.
        note: As in :func:`decode`.
        stated: Of a WAV whose samples go on behind the length that its header states: that length, in seconds.
    """
    if (kind := what_else(path)) is not None:
        raise AudioError(f"cannot be decoded as audio: it is {kind}")
    av = _pyav(f"decoding {path.name}")
    with _opened(av, path, to_the_end=stated is not None) as (container, source):
        # 1. Which track, and how long it is by its header.
        stream = container.streams.best("audio")
        if stream is None:
            raise AudioError("is a video without sound" if container.streams.video else "there is no sound in it")
        if stream.codec_context is None:
            raise AudioError("cannot be decoded as audio (its codec is unknown)")
        if stream.codec_context.name == "flac":  # else a damaged frame is heard as noise
            stream.codec_context.options = {"err_detect": "crccheck+explode"}
        tracks = len(container.streams.audio)
        if tracks > 1:
            note(f"there are {tracks} audio tracks in it; number {container.streams.audio.index(stream) + 1} is heard")
        told = _Told(*(_stated_seconds(container, stream, path) if stated is None else (stated, 0.0)))
        # 2. Decode.
        gathered = _Gathered()
        try:
            for packet in _packets(container, stream):
                try:
                    frames = packet.decode()
                except av.FFmpegError as error:
                    source.check()  # it is the packet that the disk's error has cut
                    told.damaged(error)
                    continue
                for frame in frames:
                    check_rate(frame.sample_rate)
                    if frame.format.name.removesuffix("p") not in _SCALES:
                        raise AudioError(f"its samples are of a kind that is not read ({frame.format.name})")
                    told.heard += frame.samples / frame.sample_rate
                    yield from gathered.add(frame)
            source.check()
            told.ended = True
            yield from gathered.rest()
        except (AudioError, OSError, av.FFmpegError) as error:
            yield from gathered.rest()
            source.check()
            if isinstance(error, AudioError):
                raise
            # Without FFmpeg's error, which may be the system's by its type and is not: see ByteSource.
            raise AudioError(f"cannot be decoded further ({_words(error)})") from None
        # 3. Say what was otherwise than the header says, as far as it was heard.
        finally:
            if text := told.sentence():
                note(text)
        if not told.heard:
            raise AudioError(f"cannot be decoded as audio ({told.reason or 'there are no samples in it'})")


def _packets(container: Any, stream: Any) -> Iterator[Any]:
    """The packets of a track."""
    while True:
        try:
            yield from container.demux(stream)
            return
        except IndexError:  # PyAV's, at a packet of a track that begins in the middle; those behind it follow
            continue


@contextmanager
def _opened(av: Any, path: Path, *, to_the_end: bool) -> Iterator[tuple[Any, ByteSource]]:
    """A file as an ``av.container.InputContainer``, and the bytes that it reads."""
    options = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "file"}
    if to_the_end:
        options["ignore_length"] = "1"
    with path.open("rb", buffering=0) as file:
        # "file:" because a colon in a name would be taken for an address. Tags are in any encoding.
        source = ByteSource(file, name=f"file:{path}")
        try:
            container = av.open(source, container_options=options, metadata_errors="replace")
        except av.FFmpegError as error:
            source.check()
            raise AudioError(f"cannot be decoded as audio ({_words(error)})") from None
        with container:
            yield container, source


def _words(error: Any) -> str:
    if type(error).__name__ == "ArgumentError":
        return "its format is unknown"
    return str(error.strerror or error)


@dataclass
class _Told:
    """What a header says about a track, and what was heard of it; in seconds.

    Attributes:
        stated: Its length, 0 where the header states none, None where there is no header.
        tolerance: By how much it may be otherwise.
        heard: What was decoded so far.
        ended: Whether that is all.
        reason: Why the first damaged packet cannot be decoded.
    """

    stated: float | None
    tolerance: float
    heard: float = 0.0
    ended: bool = False
    reason: str = ""
    _damaged: int = 0
    _first_damage: float = 0.0

    def damaged(self, error: Any) -> None:
        """Count a damaged packet."""
        if not self._damaged:
            self._first_damage, self.reason = self.heard, _words(error)
        self._damaged += 1

    def sentence(self) -> str:
        """How what was heard differs from the header; empty where it does not."""
        parts = []
        if self.heard and self.stated is not None:
            if self.ended and abs(self.heard - self.stated) > self.tolerance:
                parts.append(_differs(self.stated, self.heard))
            elif not self.ended and not 0 < self.stated < math.inf:
                parts.append("its header states no length")
            elif not self.ended and self.heard > self.stated + self.tolerance:
                parts.append(f"it goes on behind the {self.stated:.2f} s that its header says")
        if self.heard and self._damaged:
            packets = "a damaged packet is" if self._damaged == 1 else f"{self._damaged} damaged packets are"
            parts.append(f"{packets} left out after {self._first_damage:.2f} s")
        return "; ".join(parts)


def _stated_seconds(container: Any, stream: Any, path: Path) -> tuple[float | None, float]:
    """What a header says about a track's length, and by how much it may be otherwise; see :class:`_Told`."""
    name = container.format.name
    if name in _HEADERLESS:
        return None, 0.0
    tolerance = _LOSSLESS_TOLERANCE if stream.codec_context.codec.lossless else _LOSSY_TOLERANCE
    if name == "mp3" and (stated := _xing_seconds(path, stream.rate)) is not None:
        return stated, tolerance
    if stream.duration is not None:
        stated = float(stream.duration * stream.time_base)
    else:
        stated = (container.duration or 0) / 1e6
    # Of an mp3 without a Xing frame it is FFmpeg's guess by its first frames.
    return stated, tolerance + (0.02 * stated if name == "mp3" else 0.0)


def _xing_seconds(path: Path, rate: int) -> float | None:
    """The length in the Xing (or Info) frame of an mp3 of this rate in Hz; None where there is none."""
    with path.open("rb") as file:
        head = file.read(10)
        if head[:3] == b"ID3":  # its size is of four times seven bits
            file.seek(sum(byte << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=True)), 1)
        else:
            file.seek(0)
        found = re.search(
            rb"(?:Xing|Info)...[\x01\x03\x05\x07\x09\x0b\x0d\x0f](....)", file.read(HEAD_BYTES), re.DOTALL
        )
    if found is None:
        return None
    (frames,) = struct.unpack(">I", found[1])
    return float(frames * (1152 if rate >= 32_000 else 576) / rate)


@dataclass
class _Gathered:
    """Decoded frames, put together to blocks as long as libsndfile's."""

    _arrays: list[Any] = field(default_factory=list)
    _kind: tuple[str, int, int] = ("", 0, 0)
    _frames: int = 0

    def add(self, frame: Any) -> Iterator[Block]:
        """The blocks that are full with another ``av.AudioFrame``."""
        kind = (frame.format.name, frame.sample_rate, frame.layout.nb_channels)
        if kind != self._kind:
            yield from self.rest()
            self._kind = kind
        # Planar samples come as [channels, frames], others as [1, frames * channels].
        array = frame.to_ndarray()
        self._arrays.append(array.T if frame.format.is_planar else array.reshape(-1, kind[2]))
        self._frames += frame.samples
        size = _block_frames(kind[1], kind[2])
        while self._frames >= size:
            yield self._taken(size)

    def rest(self) -> Iterator[Block]:
        """What is left, as a block that is shorter."""
        if self._frames:
            yield self._taken(self._frames)

    def _taken(self, frames: int) -> Block:
        import numpy as np

        name, rate, _ = self._kind
        silence, full_scale = _SCALES[name.removesuffix("p")]
        joined = np.concatenate(self._arrays)
        with np.errstate(invalid="ignore"):  # NaN is spoken of later
            samples = (joined[:frames].astype(np.float64, order="C") - silence) / full_scale
        self._frames -= frames
        self._arrays = [joined[frames:]] if self._frames else []
        return Block(samples, rate)
