"""The tables of eval/results/merge.md, from the figures of bench_merge.py."""

from dataclasses import dataclass

_HEAD = """\
| | wall | wall, on disk | CPU | peak anonymous | peak resident | written | disk |
|---|---:|---:|---:|---:|---:|---:|---:|"""

_PAGE = """\
# What a merge costs

A synthetic Llama of {gigabytes:.2f} GB (bfloat16, four shards) and a rank-32 LoRA on q, k, v and o of every layer.
Medians of {rounds} interleaved rounds, page cache warm, start-up included, `--device {device}`.
Made by `eval/bench_merge.py`.

Machine: {machine}. Its disk takes {speed:.2f} GB/s in one sequential write of the same size, fsync included; the
durable merge reached {share:.0%} of that. A bare `import torch` takes {startup:.2f} s and {bare:.0f} MB of anonymous
memory. {versions}.

## One alpha

{head}
{one}

## {alphas} alphas

{head}
{sweep}

## Targets

| | measured | target | |
|---|---:|---:|---|
{targets}

"wall, on disk" ends when every byte is on the disk: our own fsync, or one after the command for the others. "written"
counts bytes put into the page cache for the disk; "disk" counts hard-linked files once. PEFT and mergekit have no
alpha: their sweep is one run, multiplied.
"""


@dataclass(frozen=True)
class Target:
    """A bound that a merge should keep.

    Attributes:
        what: What is measured.
        value: The figure.
        bound: Its limit: the most allowed, or the least if ``least``.
        unit: Of both.
        least: Which way the bound goes.
    """

    what: str
    value: float
    bound: float
    unit: str
    least: bool = False

    @property
    def met(self) -> bool:
        return self.value >= self.bound if self.least else self.value <= self.bound

    def row(self) -> str:
        side = "at least" if self.least else "at most"
        verdict = "met" if self.met else "**missed**"
        return f"| {self.what} | {self.value:.2f} {self.unit} | {side} {self.bound} {self.unit} | {verdict} |"


def targets(result: dict) -> list[Target]:
    """The bounds of the project, with what was measured."""
    medians = result["medians"]
    copy, ours, bare = medians["cp -r"], medians["mergekit-bio"], medians["import torch"]
    sweep = medians["mergekit-bio, sweep"]
    peers = [(peer, factor) for peer, factor in (("PEFT", 3), ("mergekit", 8)) if peer in medians]
    larger = result["anonymous_at_three_times_the_size"]
    return [
        Target("one alpha, beyond `cp -r`", ours["wall"] - copy["wall"], 1.5, "s"),
        *(
            Target(f"one alpha, as fast as {peer}", medians[peer]["wall"] / ours["wall"], factor, "times", least=True)
            for peer, factor in peers
        ),
        Target("peak anonymous memory above `import torch`", (ours["anonymous"] - bare["anonymous"]) / 1e6, 200, "MB"),
        Target("the same at three times the size", (larger - bare["anonymous"]) / 1e6, 200, "MB"),
        Target(
            "sweep, without start-up, as long as `cp -r`", (sweep["wall"] - bare["wall"]) / copy["wall"], 4, "times"
        ),
        Target(
            "sweep, without start-up, as long as one of eleven `cp -r` in a row",
            (sweep["wall"] - bare["wall"]) * result["alphas"] / medians["cp -r, sweep"]["wall"],
            4,
            "times",
        ),
        Target("sweep, disk, as much as one checkpoint", sweep["disk"] / copy["disk"], 3.2, "times"),
    ]


def report(result: dict) -> str:
    """The page."""
    medians, alphas = result["medians"], result["alphas"]
    bare, durable = medians["import torch"], medians["mergekit-bio, fsync"]
    peers = [peer for peer in ("PEFT", "mergekit") if peer in medians]
    swept = [_row(f"`cp -r`, {alphas} times", medians["cp -r, sweep"])]
    swept.append(_row("mergekit-bio", _with_durable(medians, "mergekit-bio, sweep")))
    swept += [_row(f"{peer}, {alphas} runs", _repeated(medians[peer], alphas)) for peer in peers]
    ours = _row("mergekit-bio", _with_durable(medians, "mergekit-bio"))
    return _PAGE.format(
        gigabytes=result["bytes"] / 1e9,
        rounds=result["rounds"],
        device=result["device"],
        machine=result["machine"],
        versions=result["versions"],
        speed=result["disk_write_speed"] / 1e9,
        share=durable["written"] / durable["durable_wall"] / result["disk_write_speed"],
        startup=bare["wall"],
        bare=bare["anonymous"] / 1e6,
        alphas=alphas,
        head=_HEAD,
        one="\n".join([_row("`cp -r`", medians["cp -r"]), ours, *(_row(peer, medians[peer]) for peer in peers)]),
        sweep="\n".join(swept),
        targets="\n".join(target.row() for target in targets(result)),
    )


def _with_durable(medians: dict, name: str) -> dict:
    """Our own fsync is part of another run: the figures of ``name`` with that run's time until all is on the disk."""
    return medians[name] | {"durable_wall": medians[f"{name}, fsync"]["durable_wall"]}


def _repeated(one: dict, count: int) -> dict:
    return one | {key: count * one[key] for key in ("wall", "durable_wall", "cpu", "written", "disk")}


def _row(name: str, one: dict) -> str:
    times = " | ".join(f"{one[key]:.2f} s" for key in ("wall", "durable_wall", "cpu"))
    memory = " | ".join(f"{one[key] / 1e6:.0f} MB" for key in ("anonymous", "resident"))
    bytes_ = " | ".join(f"{one[key] / 1e9:.2f} GB" for key in ("written", "disk"))
    return f"| {name} | {times} | {memory} | {bytes_} |"
