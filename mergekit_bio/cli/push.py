"""``mergekit-bio push``: publish a merged checkpoint on the Hugging Face Hub."""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mergekit_bio.cli.console import JsonOption, Output, QuietOption, human_bytes, table_of_numbers

if TYPE_CHECKING:
    from rich.console import Console

    from mergekit_bio.hub.push import PushReport


def push(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A merged checkpoint, or a sweep of them.")],
    repo_id: Annotated[str, typer.Argument(metavar="USER/REPO", help="The repository; created if need be.")],
    private: Annotated[bool, typer.Option("--private", help="Create the repository private.")] = False,
    revision: Annotated[str | None, typer.Option(metavar="BRANCH", help="Push to this branch, not to main.")] = None,
    receipt: Annotated[
        bool,
        typer.Option("--receipt", help="Publish merge.json and a card only: what 'rebuild' makes the checkpoint from."),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Verify, list files and sizes, send nothing.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Publish a merged checkpoint on the Hugging Face Hub.

    The directory is verified first; everything appears in one commit. A push that was cut off goes on where it
    stopped when it is run again. The checkpoints of a sweep go to branches of one repository, alpha-0.50 and so on,
    and what they share is sent once.

    \b
    Examples:
      mergekit-bio push merged/half owl/Llama-3.1-8B-NatureLM --private
      mergekit-bio push sweep owl/Llama-3.1-8B-NatureLM-sweep --dry-run
      mergekit-bio push merged/half owl/Llama-3.1-8B-NatureLM-receipt --receipt
    """
    from mergekit_bio.checkpoint.manifest import checkpoints_of_sweep
    from mergekit_bio.errors import HubError
    from mergekit_bio.hub.push import PushedFile, push_sweep
    from mergekit_bio.hub.push import push as push_checkpoint

    output = Output(as_json=as_json, quiet=quiet)
    calm_client(quiet=quiet)

    def arrived(file: PushedFile) -> None:
        output.note(f"{file.state:9}  {file.path}  ({human_bytes(file.bytes)})")

    if sweep := checkpoints_of_sweep(directory):
        if revision is not None:
            raise HubError(f"--revision {revision}: each checkpoint of a sweep has a branch of its own; leave it out")
        reports = push_sweep(directory, repo_id, private=private, receipt=receipt, dry_run=dry_run, progress=arrived)
    else:
        reports = (
            push_checkpoint(
                directory,
                repo_id,
                private=private,
                revision=revision,
                receipt=receipt,
                dry_run=dry_run,
                progress=arrived,
            ),
        )
    for note in dict.fromkeys(note for report in reports for note in report.notes):
        output.note(note)
    documents = [asdict(report) for report in reports]
    output.result(
        documents if sweep else documents[0],
        lambda console: _draw(console, reports),
        [report.url for report in reports],
    )


def calm_client(*, quiet: bool) -> None:
    """Keep the hub's client from warning at every retry, and from drawing its bars into files and pipes too."""
    from huggingface_hub.utils import disable_progress_bars, logging

    logging.set_verbosity_error()
    if quiet or not sys.stderr.isatty():
        disable_progress_bars()


def _draw(console: "Console", reports: "Sequence[PushReport]") -> None:
    if len(reports) == 1:
        _draw_one(console, reports[0])
        return
    verb = "to send" if reports[0].commit is None else "sent"
    table = table_of_numbers("", "branch", "files", verb, "bytes", "shared", "unchanged", box=None)
    total = 0
    for report in reports:
        states = Counter(file.state for file in report.files)
        sent = [file.bytes for file in report.files if file.state in ("planned", "uploaded")]
        total += sum(sent)
        numbers = [len(report.files), len(sent), human_bytes(sum(sent)), states["shared"], states["unchanged"]]
        table.add_row(report.url.rpartition("/")[2], *map(str, numbers))
    console.print(table)
    console.print(f"{verb}: {human_bytes(total)}; shared: files that another strength brings")
    _draw_notes(console, reports)
    console.print(reports[0].url.partition("/tree/")[0], soft_wrap=True)


def _draw_one(console: "Console", report: "PushReport") -> None:
    if report.commit is None:
        table = table_of_numbers("", "file", "size", box=None)
        for file in report.files:
            table.add_row(file.path, human_bytes(file.bytes))
        console.print(table)
    sent = [file.bytes for file in report.files if file.state in ("planned", "uploaded")]
    states = Counter(file.state for file in report.files)
    told = [f"{'would send' if report.commit is None else 'sent'} {len(sent)} files ({human_bytes(sum(sent))})"]
    told += [f"{states['shared']} shared with another strength"] if states["shared"] else []
    told += [f"{states['unchanged']} unchanged"] if states["unchanged"] else []
    console.print(", ".join(told))
    _draw_notes(console, [report])
    console.print(report.url + (f"/commit/{report.commit}" if report.commit else ""), soft_wrap=True)


def _draw_notes(console: "Console", reports: "Sequence[PushReport]") -> None:
    for path in dict.fromkeys(path for report in reports for path in report.removed):
        console.print(f"removed from the repository, as this checkpoint has no such weights: {path}")
    if left_out := dict.fromkeys(name for report in reports for name in report.left_out):
        console.print(f"left out: {', '.join(left_out)}")
