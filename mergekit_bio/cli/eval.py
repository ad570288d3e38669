"""``mergekit-bio eval``: from a recipe to predictions, tables and figures."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergekit_bio.cli.console import JsonOption, Output, QuietOption
from mergekit_bio.cli.engine_options import (
    ENGINE_NAMES,
    ApiKeyOption,
    ApiOption,
    EngineOption,
    ModelNameOption,
    RayOption,
    ServerOption,
    WorkersOption,
    key_value,
)
from mergekit_bio.cli.eval_plan import print_fetch, print_plan
from mergekit_bio.cli.run_progress import RunOutput

if TYPE_CHECKING:
    from rich.console import Console

    from mergekit_bio.eval.run.plan import RunPlan


def evaluate(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a recipe that comes with the package.")],
    out: Annotated[Path | None, typer.Option(help="The run directory. [default: runs/NAME]")] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DIR|ID", help="A checkpoint, or a directory with a sweep, instead of the recipe's. Repeatable."
        ),
    ] = None,
    alpha: Annotated[
        list[str] | None,
        typer.Option(
            "--alpha", "-a", metavar="ALPHA", help="Strengths instead of the recipe's: 0.5, or 0:1:0.1. Repeatable."
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|ID", help="Where BEANS-Zero is: a save_to_disk folder, parquet or arrow files, or a hub id."
        ),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(help=f"{ENGINE_NAMES}. [default: the first that is installed, or that asks --server]"),
    ] = None,
    server: ServerOption = None,
    api: ApiOption = None,
    model_name: ModelNameOption = None,
    api_key: ApiKeyOption = None,
    engine_option: EngineOption = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Ask about the first N clips of each dataset only.")] = None,
    workers: WorkersOption = None,
    ray: RayOption = None,
    show_prompts: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Print the first N prompts of each query, and load nothing.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be merged and asked, and how many tokens that is.")
    ] = False,
    probe: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="SECONDS",
            help="With --dry-run: ask the engine real questions for so long, and say how many hours the run will take.",
        ),
    ] = None,
    fetch_only: Annotated[
        bool,
        typer.Option(
            "--fetch-only",
            help="Fetch the models, rows and recordings that the run needs, and stop: after it the run asks offline "
            "(HF_HUB_OFFLINE=1). With --dry-run only the sizes are said.",
        ),
    ] = False,
    report: Annotated[bool, typer.Option("--report/--no-report", help="Score at the end and write RUN/report.")] = True,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Merge what a recipe needs, ask every checkpoint about every clip, and score the answers.

    A run that was stopped goes on where it was when the same command is given again.

    \b
    Examples:
      mergekit-bio eval closed_set
      mergekit-bio eval my_birds.yaml --model merged/half --limit 50
      mergekit-bio eval closed_set --dry-run --probe 60
      mergekit-bio eval closed_set --fetch-only
      mergekit-bio eval closed_set --engine http --api openai \\
          --server https://api.openai.com/v1 --model-name gpt-audio
    """
    from mergekit_bio.engine.interface import EngineSettings
    from mergekit_bio.errors import RecipeError
    from mergekit_bio.eval.run.evaluate import carry_out, prepare_run

    if probe is not None and (fetch_only or not dry_run):
        raise RecipeError("--probe: give it with --dry-run, and without --fetch-only")
    output = RunOutput(as_json=as_json, quiet=quiet)
    if show_prompts is not None:
        _show_prompts(recipe, data, show_prompts, output)
        return
    if api == "openai" and api_key == os.environ.get(
        "VLLM_API_KEY"
    ):  # the key of servers of ours, unless it is the only one
        api_key = os.environ.get("OPENAI_API_KEY", api_key)
    settings = EngineSettings(
        options=dict(map(key_value, engine_option or [])), servers=tuple(server or ()), api_key=api_key, quiet=quiet
    )
    plan = prepare_run(
        recipe=recipe,
        out=out,
        models=model or [],
        alphas=alpha or [],
        data=data,
        engine=engine,
        servers=server or [],
        api=api,
        model_name=model_name,
        limit=limit,
        listener=output,
        fetch=not (dry_run or fetch_only),
        check_access=fetch_only,
    )
    if fetch_only:
        print_fetch(plan, output, fetch=not dry_run)
        return
    if dry_run:
        print_plan(plan, output, settings=settings, probe_seconds=probe)
        return
    with output.shown():
        carry_out(plan, settings, listener=output, workers=workers, ray=ray)
    _print_run(plan, output, scored=report)


def _show_prompts(recipe: str, data: str | None, count: int, output: Output) -> None:
    """Print prompts as NatureLM-audio's own template renders them."""
    from mergekit_bio.audio.layout import LLAMA3_TEMPLATE
    from mergekit_bio.audio.prompt import render_prompt
    from mergekit_bio.eval.recipe.schema import load_recipe
    from mergekit_bio.eval.recipe.shipped import find_recipe
    from mergekit_bio.eval.run.questions import show_prompts

    loaded = load_recipe(find_recipe(recipe), data=data)
    for note in loaded.notes:
        output.note(f"note: {note}")
    shown: list[dict[str, Any]] = []
    for dataset, query, questions in show_prompts(loaded.recipe, count):
        for note in dataset.notes if query == 0 else ():
            output.note(f"note: {note}")
        for question in questions:
            row, instruction = question.row, question.instruction
            # No checkpoint is at hand, which could have a template of its own.
            prompt = render_prompt(instruction.text, template=LLAMA3_TEMPLATE, num_audios=len(instruction.clips))
            where = {"dataset": dataset.name, "query": query, "id": row.id, "label": row.label}
            shown.append({**where, "prompt": prompt, "audios": [*instruction.clips]})
    lines = [
        f"--- {row['dataset']}, query {row['query']}, clip {row['id']} ({row['label']})\n{row['prompt']}"
        for row in shown
    ]
    output.result({"prompts": shown}, lambda console: _print_lines(console, lines), lines)


def _print_lines(console: "Console", lines: Sequence[str]) -> None:
    for line in lines:
        console.print(line, soft_wrap=True)


def _print_run(plan: "RunPlan", output: Output, *, scored: bool) -> None:
    """The tables, and where the files are."""
    from mergekit_bio.eval.run.plan import to_document

    run = {"run": str(plan.out), "cells": to_document(plan)["cells"]}
    if not scored:
        output.result(run, lambda console: _print_lines(console, [f"predictions: {plan.out}"]), [str(plan.out)])
        return
    from mergekit_bio.cli.report import score_and_write
    from mergekit_bio.eval.records.read import read_runs
    from mergekit_bio.eval.report.build import to_document as report_document
    from mergekit_bio.eval.report.files import default_folder
    from mergekit_bio.eval.report.tables import print_report

    result, files = score_and_write(read_runs([plan.out]), output, folder=default_folder([plan.out]))
    output.result(
        {**run, "report": report_document(result), "files": files},
        lambda console: print_report(result, console),
        [str(plan.out), files[0]],
    )
    output.note(f"predictions: {plan.out}\nthe page: {files[0]}")
