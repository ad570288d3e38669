"""``mergekit-bio push``: publish a merged checkpoint on the Hugging Face Hub."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mergekit_bio.cli.console import JsonOption, Output, QuietOption, human_bytes, table_of_numbers

if TYPE_CHECKING:
    from rich.console import Console

    from mergekit_bio.hub.push import PushReport


def push(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A merged checkpoint.")],
    repo_id: Annotated[str, typer.Argument(metavar="USER/REPO", help="The repository; created if need be.")],
    private: Annotated[bool, typer.Option("--private", help="Create the repository private.")] = False,
    revision: Annotated[str | None, typer.Option(metavar="BRANCH", help="Push to this branch, not to main.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Verify, list files and sizes, send nothing.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Publish a merged checkpoint on the Hugging Face Hub.

    The directory is verified first; everything appears in one commit. A push that was cut off goes on where it
    stopped when it is run again.

    \b
    Examples:
      mergekit-bio push merged/NatureLM-audio-alpha-0.50 owl/Llama-3.1-8B-NatureLM --private
      mergekit-bio push merged/sweep/alpha-0.30 owl/Llama-3.1-8B-NatureLM-0.3 --dry-run
    """
    import sys

    from huggingface_hub.utils import disable_progress_bars, logging

    from mergekit_bio.hub.push import push as push_checkpoint

    output = Output(as_json=as_json, quiet=quiet)
    # The hub's client warns at every retry and draws its bars into files and pipes too.
    logging.set_verbosity_error()
    if quiet or not sys.stderr.isatty():
        disable_progress_bars()
    report = push_checkpoint(
        directory,
        repo_id,
        private=private,
        revision=revision,
        dry_run=dry_run,
        progress=lambda file: output.note(f"{file.state:9}  {file.path}  ({human_bytes(file.bytes)})"),
    )
    output.result(asdict(report), lambda console: _draw(console, report), [report.url])


def _draw(console: "Console", report: "PushReport") -> None:
    if report.commit is None:
        table = table_of_numbers("", "file", "size", box=None)
        for file in report.files:
            table.add_row(file.path, human_bytes(file.bytes))
        console.print(table)
    sent = [file.bytes for file in report.files if file.state != "unchanged"]
    verb = "would send" if report.commit is None else "sent"
    unchanged = len(report.files) - len(sent)
    console.print(
        f"{verb} {len(sent)} files ({human_bytes(sum(sent))})" + (f", {unchanged} unchanged" if unchanged else "")
    )
    for path in report.removed:
        console.print(f"removed from the repository, as this checkpoint has no such weights: {path}")
    if report.left_out:
        console.print(f"left out: {', '.join(report.left_out)}")
    console.print(report.url + (f"/commit/{report.commit}" if report.commit else ""), soft_wrap=True)
