"""What a dial costs: at one strength and at eleven, against one merged checkpoint and against a server a strength.

    python eval/bench_dial.py --model tiny       # puts its section into eval/results/serving.md

32 clients ask, each its next question when its last one is answered. The ways take turns, in another order in each
round, on servers that stay up: what the machine does meanwhile meets all of them.
"""

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
import machine
from bench_beams import smollm_with_ears
from results_page import put_section
from served import Served, chat, served, wav
from tiny_naturelm import make_base, make_naturelm

import mergekit_bio
from mergekit_bio.demo.run import MODEL

RESULT = Path(__file__).parent / "results" / "serving.md"
CLIENTS, CLIPS, TOKENS = 32, 32, 24
ELEVEN = tuple(n / 10 for n in range(11))
#: The strengths that have a server each.
THREE = (0.2, 0.5, 0.8)


@dataclass(frozen=True)
class Way:
    """To answer at some strengths.

    Attributes:
        name: In the table.
        targets: Server and model name, for each strength.
    """

    name: str
    targets: Sequence[tuple[Served, str]]

    @property
    def servers(self) -> list[Served]:
        """Each once."""
        return list({server.url: server for server, _ in self.targets}.values())


@dataclass(frozen=True)
class Turn:
    """Requests a second, and milliseconds of processor time of the servers a request."""

    rate: float
    cpu: float


def tiny(folder: Path) -> tuple[Path, Path]:
    """Made from random numbers."""
    base = make_base(folder / "base")
    return base, make_naturelm(folder / "naturelm", base=base)


def demo(folder: Path) -> tuple[Path, Path]:
    """The demo's, which hears."""
    return MODEL / "base", MODEL / "adapter"


#: Name -> what it is in words, what makes base and adapter, and requests a turn.
MODELS: dict[str, tuple[str, Callable[[Path], tuple[Path, Path]], int]] = {
    "tiny": ("a tiny random model: 2 layers, hidden size 64, rank 4", tiny, 320),
    "demo": ("the demo's model", demo, 192),
    "smollm2": (
        "SmolLM2-135M-Instruct, rank 4: the LoRA is 0.3% of the weights, as NatureLM-audio's is",
        smollm_with_ears,
        96,
    ),
}


def take_turn(way: Way, jobs: Sequence[tuple[int, str, str]], client: httpx.Client) -> Turn:
    """Ask all of it at once, by as many clients as there are.

    Args:
        way: Who is asked.
        jobs: Which of the strengths, the question, the recording.
        client: With as many connections.
    """

    def ask(job: tuple[int, str, str]) -> None:
        (server, model), question, audio = way.targets[job[0] % len(way.targets)], job[1], job[2]
        body = chat(model, question, audio, tokens=TOKENS)
        client.post(f"{server.url}/v1/chat/completions", json=body).raise_for_status()

    cpu, start = sum(server.cpu() for server in way.servers), time.perf_counter()
    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(ask, jobs))
    seconds = time.perf_counter() - start
    return Turn(len(jobs) / seconds, 1000 * (sum(server.cpu() for server in way.servers) - cpu) / len(jobs))


def measure(model: str, rounds: int, folder: Path, *, alone: bool) -> tuple[dict[str, list[Turn]], dict[str, int]]:
    """What the turns of each way gave, and the bytes that it has resident at the end.

    With ``alone`` the last two ways are left out, and only one merged checkpoint is served.
    """
    _, make, count = MODELS[model]
    base, adapter = make(folder)
    merged = mergekit_bio.merge(
        base=base, adapter=adapter, alphas=THREE, out=folder / "merged", dtype="float32", device="cpu"
    )
    recordings = [wav(seed) for seed in range(CLIPS)]
    draw = random.Random(0)
    with ExitStack() as stack:
        dial = stack.enter_context(served(["--base", base, "--adapter", adapter], folder / "dial.log"))
        each = [
            (stack.enter_context(served([checkpoint.path], folder / f"{n}.log")), checkpoint.path.name)
            for n, checkpoint in enumerate(merged[1:2] if alone else merged)
        ]
        client = stack.enter_context(httpx.Client(timeout=600, limits=httpx.Limits(max_connections=2 * CLIENTS)))
        name = client.get(f"{dial.url}/v1/models").json()["data"][0]["id"]
        ways = [
            Way("dial, one strength", [(dial, f"{name}@0.5")]),
            Way("dial, eleven strengths", [(dial, f"{name}@{strength:g}") for strength in ELEVEN]),
            Way("one merged checkpoint", each[len(each) // 2 :][:1]),
        ]
        if not alone:
            ways.append(Way("dial, three strengths", [(dial, f"{name}@{strength:g}") for strength in THREE]))
            ways.append(Way("three merged checkpoints, a server each", each))
        turns: dict[str, list[Turn]] = {way.name: [] for way in ways}
        for number in range(rounds + 1):
            for way in ways if number % 2 else ways[::-1]:
                # The same questions for all; each is new, and each recording has been heard but in the first round.
                jobs = [
                    (draw.randrange(33), f"Which species is it? {number}.{n}", recordings[n % CLIPS])
                    for n in range(count)
                ]
                turn = take_turn(way, jobs, client)
                print(number, way.name, turn, file=sys.stderr, flush=True)
                if number:  # the first round warms up
                    turns[way.name].append(turn)
        memory = {way.name: sum(server.memory() for server in way.servers) for way in ways}
    return turns, memory


def section(model: str, turns: dict[str, list[Turn]], memory: dict[str, int], described: str) -> str:
    """The results as Markdown."""
    what, _, count = MODELS[model]
    about = (
        f"{what[0].upper()}{what[1:]}; float32. {CLIENTS} clients ask {count} questions a turn, each about one of "
        f"{CLIPS} recordings of 10 s, at strengths drawn at random; answers have {TOKENS} tokens. Medians of "
        f"{len(next(iter(turns.values())))} rounds, in which the ways take turns; against the first way, the median "
        "and the range of the rounds' ratios. CPU and memory (what is shared counts once, 1 GiB of cache a server) are "
        f"those of the servers that a way has. Made by `python eval/bench_dial.py --model {model}`. Machine: "
        f"{described}."
    )
    lines = [f"## What the dial costs: {model}", "", about, ""]
    lines += [
        "| | requests/s | against the dial at one strength | CPU a request, ms | memory, GiB |",
        "|---|---:|---:|---:|---:|",
    ]
    first = next(iter(turns.values()))
    for name, rounds in turns.items():
        ratios = sorted(turn.rate / other.rate for turn, other in zip(rounds, first, strict=True))
        against = f"{statistics.median(ratios):.0%} ({ratios[0]:.0%} to {ratios[-1]:.0%})"
        rate, cpu = (statistics.median(getattr(turn, value) for turn in rounds) for value in ("rate", "cpu"))
        lines.append(f"| {name} | {rate:.1f} | {against} | {cpu:.0f} | {memory[name] / 2**30:.1f} |")
    one = memory["one merged checkpoint"] / 2**30
    lines += ["", f"A server for each of eleven strengths would take eleven times {one:.1f} GiB.", ""]
    return "\n".join(lines)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--alone", action="store_true", help="serve one merged checkpoint only, not one a strength")
    parser.add_argument("--results", type=Path, default=RESULT)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        turns, memory = measure(given.model, given.rounds, Path(scratch), alone=given.alone)
        text = section(given.model, turns, memory, machine.describe(Path(scratch)))
    print(text)
    put_section(given.results, text)


if __name__ == "__main__":
    main()
