"""What a file is by its content, whatever its name: a recording, or something else that has a name in plain words."""

import re
from pathlib import Path

#: Bytes that are enough to tell.
HEAD_BYTES = 4096

#: What recordings, and videos, begin with; of MP3, MP2 and AAC without tags a frame's header.
_RECORDING = re.compile(
    rb"RIFF....WAVE|RF64....WAVE|BW64....WAVE|RIFF....AVI |riff\x2e\x91\xcf\x11|FORM....(AIF[FC]|8SVX)|\.snd|caff|fLaC"
    rb"|OggS|ID3|....ftyp(?!avif|avis|hei|hev|mif1|msf1)|\x1a\x45\xdf\xa3|\x30\x26\xb2\x75\x8e\x66\xcf\x11|wvpk|#!AMR"
    rb"|TTA1|tBaK|MAC |MPCK|MP\+|DSD |\x0b\x77|\x7f\xfe\x80\x01|NIST_1A|Creative Voice File|\x64\xa3[\0-\x04]|\.RMF"
    rb"|\xff[\xe2\xe3\xf2-\xf5\xfa-\xfd][\x10-\xeb]|\xff[\xf0\xf1\xf8\xf9][\x40-\x7f]",
    re.DOTALL,
)

_ARCHIVE = "a {} archive: unpack it first"
_IMAGE = "an image"
#: Beginning -> what the file is, for those that often lie where a recording should.
_OTHERS: tuple[tuple[bytes, str], ...] = (
    (rb"version https://git-lfs", "a Git LFS pointer, not the recording: fetch it with git lfs pull"),
    (rb"(\.\./)*(\.git)?/annex/objects/", "a git-annex pointer, not the recording: fetch it with git annex get"),
    (rb"\s*(<!--.*?-->\s*)*<(!doctype\s+html|html|head|body)\b", "an HTML page: the download failed, or wants a login"),
    (rb"\s*<\?xml|\s*<error\b", "an XML document, such as servers send instead of a file"),
    (rb"#EXTM3U|\[playlist\]", "a playlist, not a recording"),
    (rb"\0\x05\x16[\0\x07]", "what macOS keeps beside a file (AppleDouble), not the recording"),
    (rb"\xff\xd8\xff|\x89PNG|GIF8|II\*\0|MM\0\*|RIFF....WEBP|BM....\0\0\0\0", _IMAGE),
    (rb"....ftyp(avif|avis|hei|hev|mif1|msf1)", _IMAGE),
    (rb"%PDF", "a PDF document"),
    (rb"MThd", "a MIDI file: notes without sound"),
    (rb"PK\x03\x04", _ARCHIVE.format("ZIP")),
    (rb"\x1f\x8b", _ARCHIVE.format("gzip")),
    (rb"7z\xbc\xaf", _ARCHIVE.format("7z")),
    (rb"Rar!", _ARCHIVE.format("RAR")),
    (rb"BZh|\xfd7zXZ|\x28\xb5\x2f\xfd", _ARCHIVE.format("compressed")),
    (rb".{257}ustar", _ARCHIVE.format("tar")),
    (rb"\x93NUMPY", "a NumPy array"),
    (rb"\x89HDF", "an HDF5 file"),
    (rb"SQLite format 3", "a database (SQLite)"),
    (rb"PAR1", "a parquet file"),
)  # fmt: skip


def is_recording(head: bytes) -> bool:
    """Whether a file that begins with these bytes is a recording, or a video that may have sound."""
    return _RECORDING.match(head) is not None


def what_else(path: Path) -> str | None:
    """What a file is that no decoder knows, in words, such as ``"an HTML page: ..."``; None where nobody can tell."""
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
        if not head:
            return "an empty file"
        for beginning, kind in _OTHERS:
            if re.match(beginning, head, re.DOTALL | re.IGNORECASE):
                return kind
        if not head.strip(b"\0"):
            while block := file.read(1 << 20):
                if block.strip(b"\0"):
                    return None
            return "nothing but zeros: it was reserved and never written"
    try:
        text = head.decode("utf-16" if head[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8")
    except UnicodeDecodeError as error:
        # A character that the end of the head cuts in two.
        if len(head) < HEAD_BYTES or error.start < HEAD_BYTES - 4:
            return None
        text = head[: error.start].decode()
    return "text" if all(character.isprintable() or character.isspace() for character in text) else None
