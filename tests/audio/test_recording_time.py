"""When a recording was made: names as recorders give them, and what their firmware and GUANO's specification write."""

import struct
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pytest
import soundfile

from mergekit_bio.audio.recording_time import recording_time


@pytest.mark.parametrize(
    ("name", "time"),
    [
        ("20180406_191730.WAV", "2018-04-06T19:17:30"),  # AudioMoth
        ("20180406_191730T.WAV", "2018-04-06T19:17:30"),  # the same, triggered by a threshold
        ("SMM04411_20180406_191730.wav", "2018-04-06T19:17:30"),  # Song Meter
        ("24F319046408B4B2_20180406_191730.WAV", "2018-04-06T19:17:30"),
        ("SITE4_20180406_191730Z.wav", "2018-04-06T19:17:30+00:00"),  # SwiftOne
        ("20180406T191730+1000_REC.flac", "2018-04-06T19:17:30+10:00"),  # Frontier Labs
        ("20180406T191730-0330_REC.flac", "2018-04-06T19:17:30-03:30"),
        ("2018-04-06_19-17-30.wav", "2018-04-06T19:17:30"),
        ("Recording 2018-04-06 19.17.30.m4a", "2018-04-06T19:17:30"),  # phones
        ("20180406_191730-0001.wav", "2018-04-06T19:17:30"),  # a numbered part, not a time zone
        ("20180406_191730_0_3.flac", "2018-04-06T19:17:30"),
        ("20180406.wav", None),
        ("120180406_191730.wav", None),
        ("20180406_1917301.wav", None),
        ("20180406_251730.wav", None),
        ("20180231_191730.wav", None),
        ("19700101_000012.WAV", None),  # a clock that was never set
        ("wren.wav", None),
    ],
)
def test_a_name_tells_the_time_only_where_it_has_a_date_and_a_time(tmp_path: Path, name: str, time: str | None) -> None:
    found = recording_time(tmp_path / name)

    assert (found and found.at(0)) == time


def with_chunk(path: Path, chunk: bytes, *, before_data: bool) -> Path:
    """A WAV file of one second with one more chunk."""
    soundfile.write(path, np.zeros(16_000), 16_000)
    content = path.read_bytes()
    place = content.index(b"data") if before_data else len(content)
    content = content[:place] + chunk + content[place:]
    path.write_bytes(content[:4] + struct.pack("<I", len(content) - 8) + content[8:])
    return path


def audiomoth_comment(time: str, zone: str) -> bytes:
    """As the firmware writes it: a LIST chunk with a comment of fixed length, filled up with zeros."""
    text = f"Recorded at {time}{zone} by AudioMoth 24E144085F256125 at medium gain while battery was 4.2V.".encode()
    comment = text.ljust(384, b"\0")
    return b"LIST" + struct.pack("<I", 4 + 8 + 384) + b"INFOICMT" + struct.pack("<I", 384) + comment


@pytest.mark.parametrize(
    ("zone", "offset"),
    [
        (" (UTC)", timedelta(0)),
        ("", timedelta(0)),  # firmware 1.0.0
        (" (UTC+2)", timedelta(hours=2)),
        (" (UTC-11)", timedelta(hours=-11)),
        (" (UTC+5:30)", timedelta(hours=5, minutes=30)),
        (" (UTC-0:30)", timedelta(minutes=-30)),
    ],
)
def test_an_audiomoths_comment_tells_the_time_and_its_zone(tmp_path: Path, zone: str, offset: timedelta) -> None:
    path = with_chunk(tmp_path / "a.wav", audiomoth_comment("19:17:30 06/04/2018", zone), before_data=True)

    assert recording_time(path).began == datetime(2018, 4, 6, 19, 17, 30, tzinfo=timezone(offset))


def test_a_comment_survives_conversion_to_flac(tmp_path: Path) -> None:
    with soundfile.SoundFile(tmp_path / "a.flac", "w", 16_000, 1) as file:
        file.comment = "Recorded at 19:17:30 06/04/2018 (UTC+2) by AudioMoth 24E144085F256125 at medium gain"
        file.write(np.zeros(16_000))

    assert recording_time(tmp_path / "a.flac").at(0) == "2018-04-06T19:17:30+02:00"


#: The beginning of the example in GUANO's specification.
GUANO = """GUANO|Version:  1.0

Timestamp:  2012-03-29T03:58:01+04:00
Species Auto ID:  MYLU
TE:  1
Samplerate:  500000
"""


@pytest.mark.parametrize("before_data", [True, False])
def test_guano_tells_the_time_wherever_its_chunk_is(tmp_path: Path, before_data: bool) -> None:
    chunk = b"guan" + struct.pack("<I", len(GUANO)) + GUANO.encode()
    path = with_chunk(tmp_path / "20180406_191730.wav", chunk + b" " * (len(GUANO) % 2), before_data=before_data)

    assert recording_time(path).at(12.5) == "2012-03-29T03:58:13.500+04:00"


def test_guano_is_read_as_its_own_library_writes_it(tmp_path: Path) -> None:
    guano = pytest.importorskip("guano")
    path = tmp_path / "20180406_191730.wav"
    soundfile.write(path, np.zeros(16_000), 16_000)
    file = guano.GuanoFile(str(path))
    file["Timestamp"] = datetime(2019, 5, 4, 21, 3, 2, tzinfo=timezone(timedelta(hours=-6)))
    file["TE"], file["Note"] = 10, "Weißstorch\nüber dem Dorf"
    file.write(make_backup=False)

    assert recording_time(path).at(25) == "2019-05-04T21:03:04.500-06:00"
    assert soundfile.info(path).frames == 16_000


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("2015-12-31T23:59:59", "2015-12-31T23:59:59"),
        ("2015-12-31T23:59:59.123", "2015-12-31T23:59:59.123"),
        ("2015-12-31T23:59:59.123456Z", "2015-12-31T23:59:59.123+00:00"),
        ("2015-12-31T23:59:59.123456+04:00", "2015-12-31T23:59:59.123+04:00"),
        ("yesterday", "2018-04-06T19:17:30"),  # what the name says
    ],
)
def test_guanos_formats_of_a_time_are_read(tmp_path: Path, written: str, read: str) -> None:
    text = f"GUANO|Version: 1.0\nTimestamp: {written}\0\0"
    text += " " * (len(text) % 2)
    chunk = b"guan" + struct.pack("<I", len(text)) + text.encode()
    found = recording_time(with_chunk(tmp_path / "20180406_191730.wav", chunk, before_data=False))

    assert found.at(0)[:23] == read[:23] and found.at(0)[-6:] == read[-6:]


@pytest.mark.parametrize("timestamp", ["9999-12-31T23:59:59", "9999-12-31T23:59:59-14:00", "2101-01-01T00:00:00Z"])
def test_a_clock_that_was_set_to_the_calendars_end_tells_nothing(tmp_path: Path, timestamp: str) -> None:
    guano = f"GUANO|Version: 1.0\nTimestamp: {timestamp}\n".encode()
    guano += b" " * (len(guano) % 2)
    chunk = b"guan" + struct.pack("<I", len(guano)) + guano
    assert recording_time(with_chunk(tmp_path / "20180406_191730.wav", chunk, before_data=False)) is None


def test_audiomoths_comment_of_the_calendars_end_tells_nothing(tmp_path: Path) -> None:
    comment = b"Recorded at 23:59:59 31/12/9999 (UTC) by AudioMoth\0\0"
    inner = b"INFOICMT" + struct.pack("<I", len(comment)) + comment
    chunk = b"LIST" + struct.pack("<I", len(inner)) + inner
    assert recording_time(with_chunk(tmp_path / "a.wav", chunk, before_data=True)) is None


def test_time_expansion_is_taken_back(tmp_path: Path) -> None:
    text = "GUANO|Version: 1.0\nTimestamp: 2012-03-29T03:58:01\nTE: 10\n"
    text += " " * (len(text) % 2)
    chunk = b"guan" + struct.pack("<I", len(text)) + text.encode()

    assert recording_time(with_chunk(tmp_path / "a.wav", chunk, before_data=True)).at(20) == "2012-03-29T03:58:03"


def test_a_64_bit_file_is_walked_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, np.zeros(16_000), 16_000, format="RF64", subtype="PCM_16")
    assert path.read_bytes()[:4] == b"RF64"
    with path.open("ab") as file:
        file.write(b"guan" + struct.pack("<I", len(GUANO)) + GUANO.encode())

    assert recording_time(path).at(0) == "2012-03-29T03:58:01+04:00"


@pytest.mark.parametrize("sizes", [(36, 0), (0xFFFFFFFF, 0xFFFFFFFF)])
def test_a_file_whose_sizes_were_never_written_ends_the_walk(tmp_path: Path, sizes: tuple[int, int]) -> None:
    path = tmp_path / "20180406_191730.wav"
    soundfile.write(path, np.zeros(160_000), 16_000)
    content = bytearray(path.read_bytes())
    content[4:8], content[40:44] = (struct.pack("<I", size) for size in sizes)
    path.write_bytes(content)

    assert recording_time(path).at(0) == "2018-04-06T19:17:30"


@pytest.mark.parametrize("content", [b"", b"RIFF", b"RIFF\0\0\0\0WAVELIST\xff\xff\0\0INFO", b"OggS", b"fLaC"])
def test_a_damaged_file_leaves_the_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "20180406_191730.wav"
    path.write_bytes(content)

    assert recording_time(path).at(0) == "2018-04-06T19:17:30"
