"""Prompts a second through vLLM, our Transformers engine and a loop in the reference's style, on the same prompts.

Writes eval/results/serving.md. On a tiny model made from random numbers by default: its tower and Llama cost little,
so what is compared is mostly the engines themselves. ``--checkpoint`` measures a real merge.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import machine
import torch
from tiny_naturelm import make_base, make_naturelm

import mergekit_bio
from mergekit_bio.audio.prefix import AudioPrefix
from mergekit_bio.eval.engines.interface import Clip, Decoding, Prompt
from mergekit_bio.eval.engines.prefix_cache import PrefixCache
from mergekit_bio.eval.engines.transformers import TransformersEngine
from mergekit_bio.eval.engines.vllm import VllmEngine

HERE = Path(__file__).resolve().parent
BATCH = 16
QUESTION = "What is the common name for the focal species in the audio? Answer with one of: marsh wren, tree frog."


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        engine: Who answered.
        audios: Audios a prompt.
        seconds: For all prompts.
        prompts: How many they were.
        first_token: Seconds to the first token of a prompt that comes alone.
    """

    engine: str
    audios: int
    seconds: float
    prompts: int
    first_token: float


def make_prompts(count: int, audios: int, *, seed: int = 0) -> list[Prompt]:
    """In-context prompts: all but a prompt's last audio are the same examples."""
    generator = torch.Generator().manual_seed(seed)

    def clip() -> Clip:
        return Clip.from_samples(torch.rand(160_000, generator=generator) - 0.5, sampling_rate=16_000)

    examples = [clip() for _ in range(audios - 1)]
    text = "".join("Audio: <Audio><AudioHere></Audio>\nLabel: marsh wren\n" for _ in examples)
    return [
        Prompt.from_text(f"{text}<Audio><AudioHere></Audio> {QUESTION} ({n})", [*examples, clip()])
        for n in range(count)
    ]


def loop(engine: TransformersEngine, prompts: Sequence[Prompt], decoding: Decoding) -> None:
    """Batches of 16 through Transformers' generate, padded on the right, each waiting for its slowest."""
    model = engine._model
    with torch.no_grad():
        for start in range(0, len(prompts), BATCH):
            rows = [engine.embed(prompt)[0] for prompt in prompts[start : start + BATCH]]
            embeds = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
            mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], True)
            model.generate(
                inputs_embeds=embeds,
                attention_mask=mask.to(embeds.device),
                max_new_tokens=decoding.max_new_tokens,
                do_sample=False,
                eos_token_id=list(engine.tokenization.eos_token_ids),
                pad_token_id=engine.tokenization.eos_token_ids[0],
            )


def timed(run: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(
    checkpoints: Sequence[Path], *, count: int, audios: int, decoding: Decoding, vllm: VllmEngine
) -> tuple[list[Row], str]:
    """All engines on one set of prompts, and what a sweep costs the tower."""
    prompts = make_prompts(count, audios)
    warm_up, alone = make_prompts(2, audios, seed=1), make_prompts(4, audios, seed=2)
    one = Decoding(max_new_tokens=1)
    transformers = TransformersEngine(checkpoints[0])
    cache = PrefixCache(AudioPrefix.from_pretrained(checkpoints[0]))
    rows = []

    def row(name: str, run: Callable[[Sequence[Prompt], Decoding], object]) -> None:
        run(warm_up, decoding)
        first = sorted(timed(lambda prompt=prompt: run([prompt], one)) for prompt in alone)[len(alone) // 2]
        rows.append(Row(name, audios, timed(lambda: run(prompts, decoding)), count, first))

    vllm.load(checkpoints[0])
    row("vLLM", vllm.generate)
    vllm.load(checkpoints[1])  # empties its caches
    vllm.load(checkpoints[0])
    tower = timed(lambda: cache([clip for prompt in prompts for clip in prompt.audios]))
    different = cache.encoded
    vllm._prefixes = cache
    row("vLLM, prefixes encoded before", vllm.generate)
    vllm._prefixes = None
    row("Transformers engine", transformers.generate)
    row(f"loop, batch {BATCH}, right-padded", lambda some, how: loop(transformers, some, how))

    before = cache.encoded
    sweep = timed(lambda: _sweep(vllm, cache, checkpoints, prompts))
    heard = sum(len(prompt.audios) for prompt in prompts)
    note = (
        f"{audios} audio{'s' * (audios > 1)} a prompt: the tower alone takes {tower:.1f} s for the {different} "
        f"different clips ({tower / rows[0].seconds:.0%} of vLLM's time above); {len(checkpoints)} alphas over the "
        f"same prompts took {sweep:.1f} s and sent {cache.encoded - before} further clips through it (instead of "
        f"{heard * len(checkpoints)} in a loop)."
    )
    return rows, note


def _sweep(vllm: VllmEngine, cache: PrefixCache, checkpoints: Sequence[Path], prompts: Sequence[Prompt]) -> None:
    vllm._prefixes = cache
    for checkpoint in checkpoints:
        vllm.load(checkpoint)
        vllm.generate(prompts, Decoding(max_new_tokens=1))
    vllm._prefixes = None


def report(rows: Sequence[Row], notes: Sequence[str], what: str) -> str:
    """The results as Markdown."""
    lines = ["# Serving", "", what, "", "| engine | audios | prompts/s | against the loop | first token, alone |"]
    lines += ["|---|---:|---:|---:|---:|"]
    for row in rows:
        (base,) = [other.seconds for other in rows if other.audios == row.audios and other.engine.startswith("loop")]
        lines.append(
            f"| {row.engine} | {row.audios} | {row.prompts / row.seconds:.1f} | {base / row.seconds:.1f}x | "
            f"{1000 * row.first_token:.0f} ms |"
        )
    return "\n".join([*lines, "", *(f"- {note}" for note in notes), ""])


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, nargs="+", help="Two or more merges of one sweep.")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--alphas", type=int, default=11, help="Of the tiny model's sweep.")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "serving.md")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        checkpoints, model = given.checkpoint, "the checkpoints " + ", ".join(map(str, given.checkpoint or ()))
        if not checkpoints:
            folder, model = Path(scratch), "a tiny random model (Llama of 2 layers, tower of 1), float32"
            merged = mergekit_bio.merge(
                base=make_base(folder / "base"),
                adapter=make_naturelm(folder / "naturelm"),
                alphas=[n / (given.alphas - 1) for n in range(given.alphas)],
                out=folder / "sweep",
            )
            checkpoints = [checkpoint.path for checkpoint in merged]
        on_gpu = torch.cuda.is_available()
        vllm = VllmEngine(checkpoints[0], max_model_len=4096, enforce_eager=not on_gpu)
        decoding = Decoding(max_new_tokens=given.tokens)
        measured = [
            measure(checkpoints, count=given.prompts, audios=audios, decoding=decoding, vllm=vllm) for audios in (1, 11)
        ]
        what = (
            f"{given.prompts} prompts, greedy, {given.tokens} new tokens at most, on {model}. Machine: "
            f"{machine.describe(Path(scratch))}, "
            f"{torch.get_num_threads()} threads."
        )
        text = report([row for rows, _ in measured for row in rows], [note for _, note in measured], what)
    print(text)
    given.results.parent.mkdir(parents=True, exist_ok=True)
    given.results.write_text(text)


if __name__ == "__main__":
    main()
