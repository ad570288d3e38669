"""A disk that fails while a recording on it is read, by the system's own doing."""

import os
from pathlib import Path


def fail_reads(path: Path) -> None:
    """From now on reading a file that this process has open is an "Input/output error", whoever reads it.

    Its descriptors become those of this process's memory, where Linux refuses to read what is not mapped, as at
    address 0. Opened anew, the file is as it was.
    """
    for entry in Path("/proc/self/fd").iterdir():
        if entry.exists() and entry.resolve() == path.resolve():
            unmapped = os.open("/proc/self/mem", os.O_RDONLY)
            os.dup2(unmapped, int(entry.name))
            os.close(unmapped)
