"""``mergekit-bio merge``: fold adapters into a base at one or several strengths."""

import shlex
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from mergekit_bio.cli.console import JsonOption, Output, QuietOption, human_bytes, table_of_numbers
from mergekit_bio.cli.push import calm_client
from mergekit_bio.merging.request import DType, MergeRequest, read_request

if TYPE_CHECKING:
    from rich.console import Console

    from mergekit_bio.merging.merge import MergedCheckpoint
    from mergekit_bio.merging.plan import MergePlan


def _default(key: str) -> str:
    """What the help says of an option that :class:`MergeRequest` has a default for."""
    return f"[default: {getattr(MergeRequest, key)}]"


def merge(
    base: Annotated[
        str | None,
        typer.Option(metavar="DIR|ID", help=f"Directory or hub id[@revision] of the base. {_default('base')}"),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DIR|ID",
            help="Directory or hub id[/folder][@revision]; repeat it to sum several; ADAPTER=0.3 has its own strength. "
            f"{_default('adapter')}",
        ),
    ] = None,
    alpha: Annotated[
        list[str] | None,
        typer.Option(
            "--alpha",
            "-a",
            metavar="ALPHA",
            help="Strength: 0.5; a sweep 0:1:0.1; by module 'q_proj=0.3,o_proj=0.6' or layer '0.5,layers.0-15=0.2' "
            "(what is not named gets the plain number; without one it stays the base); from the first layer to the "
            "last '0.5,layers=0.2..0.8'. Repeatable.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Directory to make. [default: merged/ADAPTER-alpha-0.50; for a sweep merged/ADAPTER]"),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="YAML file with these options (alphas for --alpha); the command line wins.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help=f"Of all weights: {', '.join(get_args(DType))}. {_default('dtype')}")
    ] = None,
    rounding: Annotated[
        str | None,
        typer.Option(
            help=f"stochastic keeps deltas below half a step; nearest is what PEFT does. {_default('rounding')}"
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help=f"Of the stochastic rounding. {_default('seed')}")] = None,
    device: Annotated[str | None, typer.Option(help=f"auto, cpu, cuda, cuda:N. {_default('device')}")] = None,
    text_only: Annotated[
        bool | None, typer.Option("--text-only", help="Leave an audio tower out: the result is a plain Llama.")
    ] = None,
    base_from_adapter: Annotated[
        bool | None,
        typer.Option(
            "--base-from-adapter",
            help="Where the adapter repeats weights of the base with other values, take the adapter's at every alpha, "
            "as NatureLM-audio's own code does; otherwise that is an error.",
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="Whose tokenizer: base, adapter, or auto: the base's, or that of an adapter that brings new tokens. "
            f"{_default('tokenizer')}"
        ),
    ] = None,
    share: Annotated[
        bool | None,
        typer.Option("--share/--no-share", help="Store what a sweep has in common once, hard-linked. [default: share]"),
    ] = None,
    hash: Annotated[
        str | None,
        typer.Option(
            help="What merge.json records the sha256 of: folded (computed tensors, small files), or full (whole files "
            f"too). {_default('hash')}"
        ),
    ] = None,
    fsync: Annotated[
        bool | None, typer.Option("--fsync/--no-fsync", help="Wait until all is on the disk. [default: fsync]")
    ] = None,
    overwrite: Annotated[
        bool | None, typer.Option("--overwrite", help="Replace the output of an earlier merge.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")] = False,
    push: Annotated[
        str | None, typer.Option(metavar="USER/REPO", help="Upload the result to the hub, a sweep to branches.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="With --push: create the repository private.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Fold LoRA deltas, or a full fine-tune, into a base: W(alpha) = W0 + alpha * delta.

    Writes standalone checkpoints that load in Transformers, vLLM and llama.cpp, each with a manifest (merge.json) and
    a model card.

    \b
    Examples:
      mergekit-bio merge --alpha 0.5 --out merged/half
      mergekit-bio merge --base llama/ --adapter lora/ --alpha 0:1:0.1 --out sweep
    """
    from mergekit_bio.errors import HubError
    from mergekit_bio.hub.push import PushedFile, check_ready, push_sweep
    from mergekit_bio.hub.push import push as push_checkpoint
    from mergekit_bio.merging.directory import companions
    from mergekit_bio.merging.merge import carry_out, plan_merge

    output = Output(as_json=as_json, quiet=quiet)
    started = time.perf_counter()
    # 1. Put the request together, and plan.
    request = read_request(
        recipe,
        {
            "base": base, "adapter": adapter, "alphas": alpha, "out": out, "dtype": dtype, "rounding": rounding,
            "seed": seed, "device": device, "text_only": text_only, "base_from_adapter": base_from_adapter,
            "tokenizer": tokenizer, "share": share, "hash": hash, "fsync": fsync, "overwrite": overwrite,
        },
    )  # fmt: skip
    plan = plan_merge(request)
    for note in _notes(plan):
        output.note(note)
    # 2. Find out before the long work whether its result could be pushed.
    if private and not push:
        raise HubError("--private: give it with --push USER/REPO")
    if push:
        check_ready(push, dry_run=dry_run)
    if dry_run:
        companions(plan)  # what would stop the merge stops this
        document = _plan_document(plan)
        output.result(document, lambda console: _draw_plan(console, plan, document))
        return
    # 3. Merge, push, and say what came of it.
    with output.progress("merging", plan.bytes_on_disk, unit="bytes") as advance:
        command = shlex.join(["mergekit-bio", *sys.argv[1:]])
        merged = carry_out(plan, command=command, progress=advance, note=output.note)
    seconds = time.perf_counter() - started
    pushed: list[str] = []

    def arrived(file: PushedFile) -> None:
        output.note(f"{file.state}  {file.path}")

    try:
        if push:
            calm_client(quiet=quiet)
        if push and len(merged) > 1:
            pushed += [
                report.url for report in push_sweep(request.destination, push, private=private, progress=arrived)
            ]
        elif push:
            pushed.append(push_checkpoint(merged[0].path, push, private=private, progress=arrived).url)
        for url in pushed:
            output.note(url)
    finally:  # what is merged is merged, whatever the hub says
        output.result(
            _document(plan, merged, seconds) | ({"pushed": pushed} if push else {}),
            lambda console: _draw(console, plan, merged, seconds),
            lines=pushed or [str(checkpoint.path) for checkpoint in merged],
        )


def _notes(plan: "MergePlan") -> Iterator[str]:
    """What a user should know about a merge before it is made."""
    for planned in plan.adapters:
        name = planned.adapter.source.name
        for note in planned.adapter.notes:
            yield f"{name}: {note}"
        for tensor, override in planned.adapter.overrides.items():
            rows = f" ({len(override.rows)} of {override.tensor.rows} rows)" if override.tensor.rows > 1 else ""
            yield f"{name}: its own {tensor} is taken at every alpha; it differs{rows}"
    for fold in plan.folds:
        if fold.shape and fold.shape[0] < fold.base.rows:
            yield f"{fold.name}: {fold.shape[0]} of the base's {fold.base.rows} rows stay, as many as the adapter has"
    yield from plan.tokenizer.notes
    for alpha in (planned_output.alpha for planned_output in plan.outputs):
        for strength in alpha.values:
            if not 0 <= strength <= 1:
                yield f"note: alpha {strength:g} extrapolates beyond the base (0) and the adapter (1)"


def _plan_document(plan: "MergePlan") -> dict[str, Any]:
    from mergekit_bio.merging import estimate

    return {
        "out": str(plan.request.destination),
        "outputs": [
            {"alpha": planned.alpha.label, "folder": planned.folder, "files": [*planned.files]}
            for planned in plan.outputs
        ],
        "modules": _modules(plan),
        "bytes": {"read": plan.bytes_read, "computed": plan.bytes_folded, "written": plan.bytes_on_disk},
        "memory_bytes": estimate.memory_bytes(plan),
        "seconds": estimate.seconds(plan),
    }


def _modules(plan: "MergePlan") -> list[dict[str, Any]]:
    """Per module type: how many tensors are folded, converted or copied."""
    from mergekit_bio.audio.names import MERGED_PREFIX
    from mergekit_bio.merging.rounding_loss import module_type

    folds = {fold.name: fold for fold in plan.folds}
    counts: dict[str, Counter[str]] = {}
    for name in dict.fromkeys(name for shard in plan.shards for name in shard.tensors):
        group = "audio tower" if name.startswith(MERGED_PREFIX) else module_type(name)
        fate = "copied" if name not in folds else "folded" if folds[name].deltas else "converted"
        counts.setdefault(group, Counter())[fate] += 1
    return [{"modules": group, **dict(count)} for group, count in sorted(counts.items())]


def _title(plan: "MergePlan") -> str:
    return f"{plan.base.source.name} + {', '.join(planned.adapter.source.name for planned in plan.adapters)}"


def _draw_plan(console: "Console", plan: "MergePlan", document: dict[str, Any]) -> None:
    table = table_of_numbers(_title(plan), "modules", "folded", "converted", "copied")
    for row in document["modules"]:
        table.add_row(row["modules"], *(str(row.get(fate, "")) for fate in ("folded", "converted", "copied")))
    console.print(table)
    console.print(f"alphas   {', '.join(planned.alpha.label for planned in plan.outputs)}")
    console.print(f"read     {human_bytes(plan.bytes_read)} into memory; the rest is copied by the system")
    console.print(f"compute  {human_bytes(plan.bytes_folded)}")
    written, files = human_bytes(plan.bytes_on_disk), len(plan.shards)
    console.print(f"write    {written} in {files} files to {plan.request.destination}")
    memory = human_bytes(document["memory_bytes"])
    console.print(f"expect   {document['seconds']:.0f} s if the disk keeps up, {memory} memory")
    console.print("nothing was written (--dry-run)")


def _document(plan: "MergePlan", merged: "tuple[MergedCheckpoint, ...]", seconds: float) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "checkpoints": [
            {**asdict(checkpoint), "path": str(checkpoint.path), "alpha": checkpoint.alpha.label}
            for checkpoint in merged
        ],
        "bytes_on_disk": plan.bytes_on_disk,
        "seconds": round(seconds, 3),
    }


def _draw(console: "Console", plan: "MergePlan", merged: "tuple[MergedCheckpoint, ...]", seconds: float) -> None:
    caption = (
        "d: what is added to the weights W. loss: the noise of rounding, against d. bias: the share of d that "
        "rounding drops. nearest: the same, had it been rounded as other tools do."
    )
    columns = ("alpha", "|d| / |W|", "loss", "bias", "loss, nearest", "bias, nearest")
    table = table_of_numbers(_title(plan), *columns, caption=caption, caption_justify="left")
    for checkpoint in merged:
        total = next((loss for loss in checkpoint.rounding_loss if loss.modules == "total"), None)
        cells = ["0: the base"] if checkpoint.unchanged else []
        if total is not None:
            cells = [f"{total.delta_over_weight:.2%}", f"{total.loss:#.3g}", f"{total.bias:.1e}"]
            cells += [f"{total.loss_nearest:#.3g}", f"{total.bias_nearest:.1e}"]
        table.add_row(checkpoint.alpha.label, *cells)
    console.print(table)
    where = merged[0].path if len(merged) == 1 else f"{merged[0].path.parent}/alpha-*"
    console.print(f"{where}: {human_bytes(plan.bytes_on_disk)} in {seconds:.1f} s", soft_wrap=True)
