"""``mergekit-bio rebuild``: make a checkpoint again from its receipt."""

import time
from pathlib import Path
from typing import Annotated

import typer

from mergekit_bio.cli.console import JsonOption, Output, QuietOption, human_bytes


def rebuild(
    receipt: Annotated[str, typer.Argument(metavar="RECEIPT", help="A merge.json, or a hub id[@revision] with one.")],
    out: Annotated[Path, typer.Option(help="Directory to make.")],
    base: Annotated[str | None, typer.Option(metavar="DIR|ID", help="Where the base is now, if it has moved.")] = None,
    adapter: Annotated[
        list[str] | None, typer.Option(metavar="DIR|ID", help="Where the adapters are now, in their order.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N; the bytes are the same.")] = "auto",
    fsync: Annotated[bool, typer.Option("--fsync/--no-fsync", help="Wait until all is on the disk.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output of an earlier merge.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Make a merged checkpoint again from its receipt.

    Fetches base and adapters at the revisions that were merged, folds them, and compares every hash of the receipt
    before the directory appears: of each folded tensor and each small file; what is copied is known by its source's
    fingerprint. A source that was changed since is named.

    \b
    Examples:
      mergekit-bio rebuild merged/half/merge.json --out rebuilt/half
      mergekit-bio rebuild owl/Llama-3.1-8B-NatureLM-0.5 --out merged/half
    """
    from mergekit_bio.merging.rebuild import plan_rebuild
    from mergekit_bio.merging.rebuild import rebuild as carry_out

    output = Output(as_json=as_json, quiet=quiet)
    started = time.perf_counter()
    plan = plan_rebuild(receipt, out=out, base=base, adapters=adapter, device=device, fsync=fsync, overwrite=overwrite)
    with output.progress("rebuilding", plan.merge.bytes_on_disk, unit="bytes") as advance:
        checkpoint = carry_out(plan, advance, output.note)
    seconds = time.perf_counter() - started
    counts = {
        "files": len(plan.receipt.files),
        "companions": len(plan.receipt.companions),
        "tensors": len(plan.receipt.tensors),
    }
    document = {"path": str(checkpoint.path), **counts, "bytes": plan.merge.bytes_on_disk, "seconds": round(seconds, 3)}
    whole = all(record.sha256 for record in plan.receipt.files.values())
    copied = "whole files were compared" if whole else "copied tensors are known by their source's fingerprint"
    size = human_bytes(plan.merge.bytes_on_disk)
    output.result(
        document,
        lambda console: console.print(
            f"{checkpoint.path}: {size} in {seconds:.1f} s, every hash as the receipt records: {counts['files']} files "
            f"of weights with {counts['tensors']} folded tensors, {counts['companions']} files beside them; {copied}",
            soft_wrap=True,
        ),
        lines=[str(checkpoint.path)],
    )
