"""Beam search by vLLM: greedy requests that feed it, against a request a token and beam, and against greedy decoding.

    python eval/bench_beams.py                   # puts its section into eval/results/serving.md

Every answer has as many tokens as it may have: there are no end tokens. The three ways take turns, on one engine.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")

import machine
import numpy as np
import psutil
import smollm2
from results_page import put_section
from tiny_naturelm import make_base, make_naturelm

import mergekit_bio
from mergekit_bio.audio.clip import Clip
from mergekit_bio.demo.run import MODEL
from mergekit_bio.engine.decoding.beams import BeamSearch
from mergekit_bio.engine.interface import Decoding, Prompt
from mergekit_bio.engine.vllm.offline import VllmEngine
from mergekit_bio.engine.vllm.requests import continued, one_token

RESULT = Path(__file__).parent / "results" / "serving.md"
ROUNDS = 3
QUESTION = "What is the common name for the focal species in the audio?"
SPECIES = ("marsh wren", "tree frog", "gray wolf", "humpback whale")
#: SmolLM2's own.
TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


@dataclass(frozen=True)
class Model:
    """What is asked.

    Attributes:
        name: In the table.
        make: Writes it into a folder and gives its directory.
        prompts: What it is asked.
        tokens: Lengths of the answers.
    """

    name: str
    make: Callable[[Path], Path]
    prompts: Sequence[Prompt]
    tokens: Sequence[int]


@dataclass(frozen=True)
class Cost:
    """Of one call, a prompt: requests, CPU milliseconds of this process and of the engine's, wall seconds."""

    requests: float
    driver: float
    engine: float
    wall: float


def request_a_token(engine: VllmEngine, prompts: Sequence[Prompt], decoding: Decoding) -> list[float]:
    """The search as it was fed before: a request for one token of every beam, at every step. Gives the scores."""
    tokenization = engine.tokenization
    requests = [engine._request(prompt, room=decoding.max_new_tokens) for prompt in prompts]
    searches = [
        BeamSearch(num_beams=decoding.num_beams, max_new_tokens=decoding.max_new_tokens, eos_token_ids=())
        for _ in prompts
    ]
    width = searches[0].width
    params = one_token(logprobs=width + 1)

    def likeliest(output: Any) -> list[tuple[int, float]]:
        entries = output.outputs[0].logprobs[0].items()
        known = [(token, entry.logprob) for token, entry in entries if token != tokenization.audio_token_id]
        return sorted(known, key=lambda extension: extension[1], reverse=True)[:width]

    while going := [n for n, search in enumerate(searches) if not search.done]:
        steps = {n: [continued(requests[n], beam.token_ids) for beam in searches[n].running] for n in going}
        outputs = iter(engine._step([request for asked in steps.values() for request in asked], params))
        for n, asked in steps.items():
            searches[n].advance([likeliest(next(outputs)) for _ in asked])
    return [search.finished[0].score for search in searches]


def rollouts(engine: VllmEngine, prompts: Sequence[Prompt], decoding: Decoding) -> list[float]:
    """As the package does it. Gives the scores."""
    return [generation.score or 0.0 for generation in engine.generate(prompts, decoding)]


def greedy(engine: VllmEngine, prompts: Sequence[Prompt], decoding: Decoding) -> None:
    """One beam."""
    engine.generate(prompts, Decoding(max_new_tokens=decoding.max_new_tokens, eos_token_ids=()))


WAYS: dict[str, Callable[[VllmEngine, Sequence[Prompt], Decoding], list[float] | None]] = {
    "a request a token": request_a_token,
    "rollouts": rollouts,
    "greedy": greedy,
}


def cpu() -> tuple[float, float]:
    """CPU seconds of this process and of those that it started."""
    children = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    return time.process_time(), sum(times.user + times.system for times in children)


def measure(engine: VllmEngine, prompts: Sequence[Prompt], decoding: Decoding) -> dict[str, Cost]:
    """What each way costs: medians over some rounds."""
    asked: list[str] = []
    add = engine._llm.llm_engine.add_request

    def counted(request_id: str, *arguments: Any, **named: Any) -> Any:
        asked.append(request_id)
        return add(request_id, *arguments, **named)

    engine._llm.llm_engine.add_request = counted
    taken: dict[str, list[Cost]] = {name: [] for name in WAYS}
    scores: dict[str, list[float] | None] = {}
    for _ in range(ROUNDS):
        for name, way in WAYS.items():
            assert engine._llm.reset_prefix_cache(), "requests are running"
            asked.clear()
            (driver, worker), start = cpu(), time.perf_counter()
            scores[name] = way(engine, prompts, decoding)
            wall, (driver_after, worker_after) = time.perf_counter() - start, cpu()
            cost = (len(asked), 1000 * (driver_after - driver), 1000 * (worker_after - worker), wall)
            taken[name].append(Cost(*(value / len(prompts) for value in cost)))
    engine._llm.llm_engine.add_request = add
    assert np.allclose(scores["rollouts"], scores["a request a token"], atol=1e-4), "the two ways answer differently"
    return {
        name: Cost(*(statistics.median(values) for values in zip(*map(_numbers, costs), strict=True)))
        for name, costs in taken.items()
    }


def _numbers(cost: Cost) -> tuple[float, ...]:
    return cost.requests, cost.driver, cost.engine, cost.wall


def tiny(folder: Path) -> Path:
    """Made from random numbers."""
    return _merged(make_base(folder / "base"), make_naturelm(folder / "naturelm"), folder, alpha=0.5)


def demo(folder: Path) -> Path:
    """The demo's, which hears."""
    return _merged(MODEL / "base", MODEL / "adapter", folder, alpha=0.5)


def smollm_with_ears(folder: Path) -> tuple[Path, Path]:
    """SmolLM2-135M-Instruct with a token that it does not use for the audios, and ears made from random numbers."""
    base = shutil.copytree(smollm2.base(), folder / "base")
    for file in (base / "tokenizer.json", base / "tokenizer_config.json"):
        file.write_text(file.read_text().replace("<jupyter_script>", "<|reserved_special_token_0|>"))
    naturelm = make_naturelm(folder / "naturelm", llama=base)
    config = json.loads((naturelm / "config.json").read_text()) | {"prompt_template": TEMPLATE}
    (naturelm / "config.json").write_text(json.dumps(config))
    return base, naturelm


def smollm(folder: Path) -> Path:
    """The same, merged at strength 0."""
    return _merged(*smollm_with_ears(folder), folder, alpha=0.0)


def _merged(base: Path, adapter: Path, folder: Path, *, alpha: float) -> Path:
    out = folder / "merged"
    mergekit_bio.merge(base=base, adapter=adapter, alphas=[alpha], out=out, dtype="float32", device="cpu")
    return out


def noise(count: int) -> list[Prompt]:
    """Questions on a clip of noise each."""
    generator = np.random.default_rng(0)
    clips = [Clip.from_samples(generator.uniform(-0.5, 0.5, 160_000), sampling_rate=16_000) for _ in range(count)]
    return [Prompt(f"<Audio><AudioHere></Audio> {QUESTION} ({n})", [clip]) for n, clip in enumerate(clips)]


def words() -> list[Prompt]:
    """Questions in words alone."""
    return [Prompt(f"What does the {species} sound like?") for species in SPECIES]


def row(model: str, decoding: Decoding, costs: Sequence[Cost]) -> str:
    """Of the table."""
    before, now, _ = costs

    def three(value: Callable[[Cost], float]) -> str:
        return " / ".join(f"{value(cost):.1f}" for cost in costs)

    cells = [model, str(decoding.num_beams), str(decoding.max_new_tokens)]
    cells += [three(lambda cost: cost.requests), f"{before.requests / now.requests:.1f}x"]
    cells += [three(lambda cost: cost.driver), f"{before.driver / now.driver:.1f}x"]
    cells += [three(lambda cost: cost.driver + cost.engine)]
    cells += [f"{(before.driver + before.engine) / (now.driver + now.engine):.1f}x", three(lambda cost: 1 / cost.wall)]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beams", type=int, nargs="+", default=(2, 4))
    parser.add_argument("--results", type=Path, default=RESULT)
    given = parser.parse_args()
    models = (
        Model("random", tiny, noise(32), (1, 4, 8, 24, 64, 100)),
        Model("demo", demo, noise(24), (1, 4, 8, 24, 64, 100)),
        Model("SmolLM2-135M", smollm, words(), (4, 8, 24)),
    )
    rows = []
    for model in models:
        with tempfile.TemporaryDirectory() as folder:
            engine = VllmEngine(model.make(Path(folder)), dtype="float32", max_model_len=1024, enforce_eager=True)
            measure(engine, model.prompts, Decoding(max_new_tokens=2, num_beams=2, eos_token_ids=()))  # warm up
            for beams in given.beams:
                for tokens in model.tokens:
                    decoding = Decoding(max_new_tokens=tokens, num_beams=beams, eos_token_ids=())
                    costs = measure(engine, model.prompts, decoding)
                    rows.append(row(model.name, decoding, list(costs.values())))
                    print(rows[-1], flush=True)
            engine.close()
    put_section(
        given.results,
        f"""## Beam search

Three ways: a request for one token of each beam at each step, as it was before / rollouts, as it is now / greedy
decoding, which has one beam. Requests and milliseconds are those of a prompt. Driver is the process that has the
search; all CPU is that and vLLM's process, with the model in it. Medians of {ROUNDS} rounds, in which the three take
turns on one engine whose prefix cache is empty at first. The two searches give the same scores. Answers end at the
length given.

The random model is asked about 32 clips of noise, the demo's about 24, SmolLM2-135M-Instruct 4 questions in words;
float32 on a CPU, where a block of the prefix cache has 128 tokens. A random model forks at almost every token.
Made by `python eval/bench_beams.py`. Machine: {machine.describe(RESULT.parent)}.

| model | beams | tokens | requests | fewer | driver CPU, ms | less | all CPU, ms | less | prompts/s |
|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|
{chr(10).join(rows)}
""",
    )


if __name__ == "__main__":
    main()
