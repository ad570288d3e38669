"""Where folding's processor time goes, on tensors of the published size.

Folds the first layers of the published pair (random weights) at alpha 0.5 with the settings of ``merge``, in one thread
under cProfile, and writes the seconds that each step would take for all 32 layers into eval/results/folding.md.
"""

import argparse
import cProfile
import pstats
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import machine
import torch
from results_page import put_section

from mergekit_bio import MergeRequest
from mergekit_bio.audio.device import full_float32
from mergekit_bio.merging.fold import Folder
from mergekit_bio.merging.merge import plan_merge

HERE = Path(__file__).resolve().parent
ALL_LAYERS = 32
#: What a function's name tells of the step it belongs to; the first that fits. All else is told as one.
STEPS = {
    "product B A in float64": ("torch.mm",),
    "SHA-256 of what is written": ("'update' of '_hashlib",),
    "reading W0 from the page cache": ("posix.preadv", "posix.pread"),
    "writing into the page cache": ("posix.pwrite",),
    "noise of stochastic rounding": ("bitwise_right_shift", "'bitwise_and_'", "'bitwise_xor_'"),
    "widening and narrowing": ("'copy_'", "'to' of"),
    "strength times delta, plus W0": ("'mul_'", "torch.mul", "'add_'", "torch.add"),
    "is it finite": ("torch.dot", "'sum' of"),
}


def fold_in_one_thread(base: Path, adapter: Path, out: Path) -> tuple[pstats.Stats, float, float]:
    """Fold all that the adapter changes.

    Returns:
        The profile by processor time, its seconds, and bytes folded.
    """
    torch.set_num_threads(1)
    plan = plan_merge(MergeRequest(base=base, adapter=adapter, alphas=[0.5], out=out, device="cpu"))
    for shard in plan.shards:
        (out / shard.file).parent.mkdir(parents=True, exist_ok=True)
        with (out / shard.file).open("wb") as file:
            file.truncate(shard.size)
    folder = Folder(root=out, device=torch.device("cpu"), request=plan.request, progress=lambda count: None)
    with full_float32():
        folder.fold(plan.folds[0])  # buffers are there, kernels have been chosen
        profile = cProfile.Profile(time.thread_time)
        profile.enable()
        for fold in plan.folds:
            folder.fold(fold)
        profile.disable()
    stats = pstats.Stats(profile)
    return stats, stats.total_tt, sum(fold.nbytes for fold in plan.folds)  # type: ignore[attr-defined]


def steps_of(stats: pstats.Stats) -> dict[str, float]:
    """Processor seconds by step."""
    seconds = dict.fromkeys([*STEPS, "all else"], 0.0)
    for (_, _, function), (_, _, own, *_) in stats.stats.items():  # type: ignore[attr-defined]
        step = next((step for step, names in STEPS.items() if any(name in function for name in names)), "all else")
        seconds[step] += own
    return seconds


def import_seconds() -> float:
    """Processor time of importing torch."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Run the profile."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        hub = Path(scratch) / "hub"
        writer = [sys.executable, HERE / "published_pair.py", hub, "--layers", str(given.layers)]
        subprocess.run(writer, check=True, stdout=subprocess.DEVNULL)
        base, adapter = (next(hub.glob(f"models--{name}*/snapshots/*")) for name in ("meta", "Earth"))
        stats, total, nbytes = fold_in_one_thread(base, adapter, Path(scratch) / "out")
        described = machine.describe(Path(scratch))
    scale = ALL_LAYERS / given.layers
    steps = sorted(steps_of(stats).items(), key=lambda step: -step[1])
    rows = [f"| {step} | {seconds * scale:.1f} | {seconds / total:.0%} |" for step, seconds in steps]
    section = f"""## Where folding's processor time goes

NatureLM-audio's LoRA (rank 32, 128 matrices, {nbytes * scale / 1e9:.1f} GB of bfloat16) at one alpha, stochastic
rounding; {given.layers} layers in one thread under cProfile, times {scale:g}. Importing torch comes to it,
{import_seconds():.1f} s, and copying the other 13.8 GB. Made by `python eval/profile_fold.py`. Machine: {described}.

| step | CPU, s | share |
|---|---:|---:|
"""
    put_section(HERE / "results" / "folding.md", section + "\n".join([*rows, f"| all | {total * scale:.1f} | |"]))
    print(section + "\n".join(rows))


if __name__ == "__main__":
    main()
