"""When a recording was made: from what its recorder wrote into it, else from its name.

Recorders write one of these:

- GUANO metadata, a chunk ``guan`` of a WAV file with a line ``Timestamp: 2012-03-29T03:58:01+04:00``
  (https://github.com/riggsd/guano-spec); Wildlife Acoustics, Titley, Pettersson, Batlogger, newer AudioMoths.
- AudioMoth's comment, ``Recorded at 19:17:30 06/04/2018 (UTC+2) by AudioMoth ...``, day before month.
- A date and a time in the name: ``20180406_191730.WAV``, ``SITE4_20180406_191730Z.wav``,
  ``20180406T191730+1000_REC.flac``, ``2018-04-06_19-17-30.wav``.
"""

import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import BinaryIO

from mergekit_bio.audio.wav_chunks import wav_chunks

#: A recorder whose clock was never set begins in 1970, or in 1980; one that is set wrongly may end with the calendar.
_FIRST_YEAR, _LAST_YEAR = 1990, 2100

#: Chunks of text are small; whatever is longer is not read.
_LONGEST_TEXT = 1 << 20

_AUDIOMOTH = re.compile(
    r"Recorded at (?P<time>\d\d:\d\d:\d\d(?:\.\d+)?) (?P<day>\d\d)/(?P<month>\d\d)/(?P<year>\d{4})"
    # The first firmware had one time zone and did not name it: UTC.
    r"(?: \(UTC(?:(?P<sign>[+-])(?P<hours>\d{1,2})(?::(?P<minutes>[\d ]\d))?)?\))?"
)

# A number before or after would make it something else, such as a serial number. What looks like a time zone and is
# none, such as the -0001 of a numbered part, is left alone.
_NAME = re.compile(
    r"(?<!\d)(?P<year>(?:19|20)\d\d)(?P<dash>[-_.]?)(?P<month>0[1-9]|1[0-2])(?P=dash)(?P<day>0[1-9]|[12]\d|3[01])"
    r"[-_. T]"
    r"(?P<hour>[01]\d|2[0-3])(?P<colon>[-_.:]?)(?P<minute>[0-5]\d)(?P=colon)(?P<second>[0-5]\d)"
    r"(?:(?P<utc>Z)|(?P<sign>[+-])(?P<hours>0\d|1[0-4]):?(?P<minutes>00|15|30|45))?(?!\d)"
)


@dataclass(frozen=True)
class RecordingTime:
    """When a recording began.

    Attributes:
        began: With its offset from UTC where that is known.
        expansion: Seconds of the file that a second of the world takes: 10 in a bat detector's time expansion.
    """

    began: datetime
    expansion: float = 1.0

    def at(self, seconds: float) -> str:
        """The time of a place in the file, ``2018-04-06T19:17:30.500+02:00``: milliseconds where there are any."""
        time = self.began + timedelta(milliseconds=round(1000 * seconds / self.expansion))
        return time.isoformat(timespec="milliseconds" if time.microsecond else "seconds")


def recording_time(path: Path) -> RecordingTime | None:
    """When a recording was made; None where neither the file nor its name tells, or its clock was not set right."""
    guano, comment = _written_into(path)
    time = _of_guano(guano) or _of_audiomoth(comment) or _of_name(path.stem)
    return time if time and _FIRST_YEAR <= time.began.year <= _LAST_YEAR else None


def _of_guano(fields: Mapping[str, str]) -> RecordingTime | None:
    try:
        began = datetime.fromisoformat(fields.get("Timestamp", ""))
    except ValueError:
        return None
    try:
        expansion = float(fields.get("TE", "") or 1)
    except ValueError:
        expansion = 1.0
    return RecordingTime(began, expansion if 1 <= expansion <= 1000 else 1.0)


def _of_audiomoth(comment: str) -> RecordingTime | None:
    if (found := _AUDIOMOTH.search(comment)) is None:
        return None
    with suppress(ValueError):
        day = datetime.fromisoformat(f"{found['year']}-{found['month']}-{found['day']}T{found['time']}")
        return RecordingTime(day.replace(tzinfo=_zone(found["sign"], found["hours"], found["minutes"])))
    return None


def _of_name(stem: str) -> RecordingTime | None:
    for found in _NAME.finditer(stem):
        with suppress(ValueError):  # 31 February
            parts = [int(found[part]) for part in ("year", "month", "day", "hour", "minute", "second")]
            zoned = found["utc"] or found["sign"]
            zone = _zone(found["sign"], found["hours"], found["minutes"]) if zoned else None
            return RecordingTime(datetime(*parts, tzinfo=zone))  # type: ignore[misc, arg-type]
    return None


def _zone(sign: str | None, hours: str | None, minutes: str | None) -> timezone:
    offset = timedelta(hours=int(hours or 0), minutes=int(minutes or 0))
    return timezone(-offset if sign == "-" else offset) if offset else UTC


def _written_into(path: Path) -> tuple[dict[str, str], str]:
    """GUANO's fields and the comment of a file; empty where there are none, or it cannot be read."""
    guano: dict[str, str] = {}
    comment = ""
    with suppress(OSError), path.open("rb") as file:
        if file.read(4) in (b"fLaC", b"OggS"):  # where a converter has kept the recorder's comment
            return guano, _comment(path)
        for name, text in _texts(file):
            if name == b"guan":
                lines = (line.partition(":") for line in text.splitlines())
                guano = {key.strip(): value.strip(" \t\r\0") for key, colon, value in lines if colon}
            else:
                comment = text
    return guano, comment


def _comment(path: Path) -> str:
    import soundfile

    with suppress(soundfile.SoundFileError), soundfile.SoundFile(path) as file:
        return file.comment or ""
    return ""


def _texts(file: BinaryIO) -> Iterator[tuple[bytes, str]]:
    """The chunks ``guan`` and ``ICMT`` of a WAV file."""
    for name, _, size in wav_chunks(file):
        if size is None or size > _LONGEST_TEXT:
            continue
        if name == b"guan":
            yield name, file.read(size).decode(errors="replace")
        elif name == b"LIST":
            content = file.read(size)
            at = 4
            while content[:4] == b"INFO" and at + 8 <= len(content):
                inner, length = struct.unpack_from("<4sI", content, at)
                if inner == b"ICMT":
                    text = content[at + 8 : at + 8 + length]
                    yield inner, text.split(b"\0")[0].decode(errors="replace")
                at += 8 + length + length % 2
