"""Copying without reading: the bytes arrive, whatever the file system can do."""

import ctypes
import os
import sys
import time
from pathlib import Path

import pytest

from mergekit_bio.checkpoint import clone


@pytest.fixture
def files(tmp_path):
    source = tmp_path / "source"
    source.write_bytes(os.urandom(3_000_001))
    target = tmp_path / "target"
    target.write_bytes(b"." * 10)
    reader, writer = os.open(source, os.O_RDONLY), os.open(target, os.O_RDWR)
    yield source, target, reader, writer
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("in_kernel", [True, False])
def test_a_range_arrives_at_its_offset(files, in_kernel, monkeypatch):
    source, target, reader, writer = files
    if not in_kernel:
        monkeypatch.setattr(clone, "_CHUNK", 1 << 16)

        def refuse(*_: int) -> int:
            raise OSError(18, "Invalid cross-device link")

        monkeypatch.setattr(os, "copy_file_range", refuse)
    clone.copy_range(reader, 1000, writer, 5, 2_000_000)
    assert target.read_bytes() == b"....." + source.read_bytes()[1000:2_001_000]


def test_a_source_that_ends_early_is_an_error(files):
    _, _, reader, writer = files
    with pytest.raises(OSError, match="shorter"):
        clone.copy_range(reader, 2_999_990, writer, 0, 100)


def test_between_file_systems(files, tmp_path_factory):
    source, _, reader, _ = files
    memory = "/dev/shm/mergekit-bio-test-clone"
    if not os.path.isdir("/dev/shm"):  # noqa: PTH112
        pytest.skip("no second file system at /dev/shm")
    writer = os.open(memory, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    try:
        assert not clone.reflink(reader, writer)
        clone.copy_range(reader, 0, writer, 0, 3_000_001)
        assert os.pread(writer, 4_000_000, 0) == source.read_bytes()
    finally:
        os.close(writer)
        os.unlink(memory)  # noqa: PTH108


def test_a_link_shares_the_file(tmp_path):
    (tmp_path / "a").write_bytes(b"x")
    assert clone.link_or_copy(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a").samefile(tmp_path / "b")


def test_a_copy_where_there_are_no_links(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"x")

    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    assert not clone.link_or_copy(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"x" and not (tmp_path / "a").samefile(tmp_path / "b")


class CacheStat(ctypes.Structure):
    """What Linux knows of a file's pages in memory (cachestat(2), since 6.5)."""

    _fields_ = tuple((name, ctypes.c_uint64) for name in ("cached", "dirty", "writing", "evicted", "recently_evicted"))

    @classmethod
    def of(cls, file: Path) -> "CacheStat":
        found, whole = cls(), (ctypes.c_uint64 * 2)(0, 0)
        with file.open("rb") as stream:
            if ctypes.CDLL(None).syscall(451, stream.fileno(), whole, ctypes.byref(found), 0):
                pytest.skip("this system does not tell which pages are dirty")
        return found


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_what_is_sent_to_the_disk_is_no_longer_dirty_and_still_in_memory(tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(bytes(8 << 20))
    before = CacheStat.of(file)
    if not before.dirty:
        pytest.skip("the system has written it already, or keeps files in memory")
    clone.start_write_back(file, 0, 8 << 20)
    while (after := CacheStat.of(file)).dirty or after.writing:
        time.sleep(0.01)
    assert after.cached == before.cached == (8 << 20) // os.sysconf("SC_PAGE_SIZE")
