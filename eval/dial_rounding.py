"""What bfloat16 costs a dial, and what it costs merges: both against merges in float32, on the demo's model.

    python eval/dial_rounding.py                 # puts its section into eval/results/serving.md

A merge rounds W + alpha d once and stores it. A dial keeps W, and rounds alpha B and what it adds while it computes.
Every way computes in its own dtype, so a part of the difference is that of the computation; strength 0, where nothing
is added and nothing rounded, shows how large it is.
"""

import argparse
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")

from results_page import put_section

import mergekit_bio
from mergekit_bio.audio.recording import read_clip
from mergekit_bio.demo.recordings import write_recordings
from mergekit_bio.demo.run import MODEL
from mergekit_bio.demo.species import HEARD
from mergekit_bio.engine.interface import Decoding, Prompt
from mergekit_bio.engine.vllm.dial import Dial, write_strength
from mergekit_bio.engine.vllm.offline import VllmEngine
from mergekit_bio.engine.vllm.requests import MAX_LOGPROBS, continued, one_token, sampling_params
from mergekit_bio.serve.dial import DialRequest, prepared_dial

RESULT = Path(__file__).parent / "results" / "serving.md"
QUESTION = "What is the common name for the focal species in the audio?"
ALPHAS = tuple(n / 10 for n in range(11))
DECODING = Decoding(max_new_tokens=8)

#: What is likeliest next, token -> log-probability, at each step of an answer.
Steps = list[dict[int, float]]


def greedy(engine: VllmEngine, prompts: Sequence[Prompt], adapter: object = None) -> list[tuple[int, ...]]:
    """The engine's own answers."""
    requests = [engine._request(prompt, room=DECODING.max_new_tokens) for prompt in prompts]
    params = sampling_params(DECODING, engine.tokenization, seed=0)
    outputs = engine._llm.generate(requests, params, lora_request=adapter, use_tqdm=False)
    return [tuple(output.outputs[0].token_ids) for output in outputs]


def along(engine: VllmEngine, prompts: Sequence[Prompt], answers: Sequence[tuple[int, ...]], adapter: object) -> Steps:
    """What the engine finds likeliest at each step of given answers."""
    asked = [
        continued(engine._request(prompt, room=DECODING.max_new_tokens), answer[:length])
        for prompt, answer in zip(prompts, answers, strict=True)
        for length in range(len(answer))
    ]
    outputs = engine._llm.generate(asked, one_token(logprobs=MAX_LOGPROBS), lora_request=adapter, use_tqdm=False)
    return [{token: entry.logprob for token, entry in out.outputs[0].logprobs[0].items()} for out in outputs]


def divergence(wanted: dict[int, float], found: dict[int, float]) -> float:
    """KL(wanted || found) in nats; the tokens that are not among the likeliest of both count as one."""
    both = wanted.keys() & found.keys()
    rest = [max(1e-12, 1 - sum(math.exp(side[token]) for token in both)) for side in (wanted, found)]
    return sum(math.exp(wanted[token]) * (wanted[token] - found[token]) for token in both) + rest[0] * math.log(
        rest[0] / rest[1]
    )


def row(alpha: float, wanted: tuple[list, Steps], merge: tuple[list, Steps], dial: tuple[list, Steps]) -> str:
    """A line of the table: KL and answers that differ, of the merge and of the dial."""
    cells = [f"{alpha:g}"]
    for answers, steps in (merge, dial):
        divergences = [divergence(one, other) for one, other in zip(wanted[1], steps, strict=True)]
        differ = sum(one != other for one, other in zip(wanted[0], answers, strict=True))
        cells += [f"{sum(divergences) / len(divergences):.1e}", f"{differ} of {len(answers)}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=4, help="recordings of every species")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_recordings(folder / "recordings", HEARD, each=given.each, seed=1)
        prompts = [Prompt(QUESTION, [read_clip(file)]) for file in sorted((folder / "recordings").glob("*.wav"))]
        base, adapter = MODEL / "base", MODEL / "adapter"
        found: dict[str, list[tuple[list, Steps]]] = {"float32": [], "bfloat16": [], "dial": []}
        # 1. Merges in float32 say what is right; those in bfloat16 are asked along the same answers.
        for dtype in ("float32", "bfloat16"):
            merged = mergekit_bio.merge(base=base, adapter=adapter, alphas=ALPHAS, out=folder / dtype, dtype=dtype)
            engine = VllmEngine(merged[0].path, enforce_eager=True)
            for n, checkpoint in enumerate(merged):
                engine.load(checkpoint.path)
                answers = greedy(engine, prompts)
                right = answers if dtype == "float32" else found["float32"][n][0]
                found[dtype].append((answers, along(engine, prompts, right, None)))
            engine.close()
        # 2. The dial, in the base's own bfloat16.
        with prepared_dial(DialRequest(base, adapter)) as files:
            dial = Dial([files.name], files.adapters, default=500, aliases={})
            engine = VllmEngine(
                files.model,
                enforce_eager=True,
                enable_lora=True,
                max_lora_rank=files.slots.slot_rank,
                lora_target_modules=files.slots.vllm_layers,
            )
            for n, alpha in enumerate(ALPHAS):
                strength = dial[f"{files.name}@{write_strength(round(1000 * alpha))}"]
                right = found["float32"][n][0]
                found["dial"].append((greedy(engine, prompts, strength), along(engine, prompts, right, strength)))
            engine.close()
    lines = ["## The dial and bfloat16", ""]
    what = (
        f"The demo's model, {len(prompts)} recordings, greedy answers of {DECODING.max_new_tokens} tokens at most. "
        "Against merges in float32: how far the next token's distribution is off, along the float32 merge's answer (KL "
        "in nats, the mean over tokens), and how many answers differ. vLLM computes everything, in the dtype named. At "
        "alpha 0 nothing else differs."
    )
    lines += [
        what,
        "",
        "| alpha | merge in bfloat16, KL | answers that differ | dial in bfloat16, KL | answers that differ |",
        "|---:|---:|---:|---:|---:|",
    ]
    lines += [row(alpha, *(found[way][n] for way in found)) for n, alpha in enumerate(ALPHAS)]
    text = "\n".join(lines)
    print(text)
    put_section(RESULT, text)


if __name__ == "__main__":
    main()
