"""What resampling 10 s of sound to 16 kHz takes: CPU milliseconds, beside one block at a time and beside resampy.

python eval/bench_resampling.py            # writes eval/results/resampling.md
"""

import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import machine
import numpy as np
import resampy
import soundfile
import torch

from mergekit_bio.audio import waveform

RATES = (8000, 11_025, 22_050, 24_000, 32_000, 44_100, 44_101, 48_000, 96_000, 192_000, 256_000, 384_000, 500_000)
SECONDS, ROUNDS = 10, 5
RESULT = Path(__file__).parent / "results" / "resampling.md"
#: Reads a recording in windows, as every command does, and prints the peak resident memory that this added, in bytes.
READ = """
import sys
from pathlib import Path
from mergekit_bio.audio.recording import read_windows
import numpy, soundfile, torch
def kilobytes(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))
before = kilobytes("VmRSS")
windows = sum(1 for _ in read_windows(Path(sys.argv[1])))
print(windows, 1024 * (kilobytes("VmHWM") - before))
"""


def cpu_milliseconds(work: Callable[[], object]) -> float:
    """The median of some rounds, after one that is not counted."""
    work()
    taken = []
    for _ in range(ROUNDS):
        start = time.process_time()
        work()
        taken.append(1000 * (time.process_time() - start))
    return statistics.median(taken)


def one_block_at_a_time(samples: torch.Tensor, rate: int) -> torch.Tensor:
    """The same filter as it was laid out before."""
    least, waveform._LEAST_STEP = waveform._LEAST_STEP, (1, 1)
    try:
        return waveform.resample(samples, sampling_rate=rate)
    finally:
        waveform._LEAST_STEP = least


def memory_of_an_hour(rate: int) -> tuple[int, int]:
    """Windows, and bytes that reading an hour at this rate in windows adds to the resident memory."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "hour.wav"
        block = (np.random.default_rng(0).uniform(-0.5, 0.5, 60 * rate) * 2**15).astype(np.int16)
        with soundfile.SoundFile(file, "w", rate, 1, "PCM_16", format="RF64") as out:
            for _ in range(60):
                out.write(block)
        done = subprocess.run([sys.executable, "-c", READ, file], capture_output=True, text=True, check=True)
    windows, added = map(int, done.stdout.split())
    return windows, added


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for rate in RATES:
        samples = np.random.default_rng(rate).uniform(-0.5, 0.5, SECONDS * rate)
        tensor = torch.from_numpy(samples)
        start = time.process_time()
        waveform._kernels.cache_clear()
        waveform.resample(tensor[: rate // 10], sampling_rate=rate)
        kernels = 1000 * (time.process_time() - start)
        now = cpu_milliseconds(lambda: waveform.resample(tensor, sampling_rate=rate))  # noqa: B023
        before = cpu_milliseconds(lambda: one_block_at_a_time(tensor, rate))  # noqa: B023
        peer = cpu_milliseconds(lambda: resampy.resample(samples, rate, 16_000))  # noqa: B023
        rows.append(f"| {rate:,} Hz | {now:,.0f} | {kernels:,.0f} | {before:,.0f} | {peer:,.0f} |")
        print(rows[-1], flush=True)
    windows, added = memory_of_an_hour(384_000)
    RESULT.write_text(
        f"""# Resampling to 16 kHz

CPU milliseconds for {SECONDS} s of sound on one core, medians of {ROUNDS} rounds; the kernels, which are kept for the
next recording of that rate, timed apart. "one block at a time" is the same filter as it was laid out before, and gives
the same samples to 1e-14; resampy is what NatureLM-audio itself uses. Made by `eval/bench_resampling.py`.

Machine: {machine.describe(RESULT.parent)}. Python {platform.python_version()}, PyTorch {torch.__version__}.

| rate | now | kernels, once | one block at a time | resampy |
| --- | ---: | ---: | ---: | ---: |
{chr(10).join(rows)}

Reading an hour at 384,000 Hz in {windows} windows adds {added / 1e6:.0f} MB to the resident memory.
"""
    )
    print(RESULT.read_text().splitlines()[-1])


if __name__ == "__main__":
    main()
