"""``mergekit-bio doctor``: what this machine has and lacks, and how to mend it."""

from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from mergekit_bio.cli.console import JsonOption, Output, QuietOption

if TYPE_CHECKING:
    from rich.console import Console

_STYLES = {"ok": "green", "optional": "cyan", "warning": "yellow", "problem": "red"}


def doctor(as_json: JsonOption = False, quiet: QuietOption = False) -> None:
    """Look at packages, GPU, vLLM, hub access and disk; say what is missing and what to do about it.

    A problem keeps the default models from being merged here, and makes the exit code 1; a warning limits asking,
    serving or evaluating; what is optional, only some need. --quiet prints problems and warnings only.

    \b
    Examples:
      mergekit-bio doctor
      mergekit-bio doctor --quiet && mergekit-bio merge --alpha 0.5
    """
    from mergekit_bio.diagnosis import diagnose

    output = Output(as_json=as_json, quiet=quiet)
    output.note("looking around; importing vLLM takes some seconds\n")
    findings = list(diagnose())
    wrong = [finding for finding in findings if finding.state in ("warning", "problem")]
    problems = sum(finding.state == "problem" for finding in wrong)

    def draw(console: "Console") -> None:
        from rich.text import Text

        for finding in findings:
            line = Text(f"{finding.state:<9}", style=_STYLES[finding.state])
            line.append(f"{finding.name}: {finding.detail}", style="default")
            if finding.fix:
                line.append(f"\n{'':<9}-> {finding.fix}", style="default bold")
            console.print(line, soft_wrap=True)  # commands and addresses stay whole, to be copied

    output.result(
        {"ready_to_merge": not problems, "findings": [asdict(finding) for finding in findings]},
        draw,
        [f"{finding.state}: {finding.name}: {finding.detail} -> {finding.fix}" for finding in wrong],
    )
    ready = "not ready" if problems else "ready"
    output.note(f"\n{ready} to merge; problems: {problems}, warnings: {len(wrong) - problems}")
    if problems:
        raise typer.Exit(1)
