"""What ``eval`` says of a run that it does not make: ``--dry-run`` what is asked, ``--fetch-only`` what is fetched."""

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from mergekit_bio.cli.console import human_bytes, table_of_numbers

if TYPE_CHECKING:
    from rich.console import Console

    from mergekit_bio.cli.run_progress import RunOutput
    from mergekit_bio.engine.interface import EngineSettings
    from mergekit_bio.eval.run.plan import RunPlan
    from mergekit_bio.eval.run.probe import Probe


def print_plan(
    plan: "RunPlan", output: "RunOutput", *, settings: "EngineSettings", probe_seconds: float | None
) -> None:
    """Print what would be merged and asked, the tokens that takes, and after a probe the hours.

    Args:
        plan: Of the run.
        output: The command's.
        settings: What the engine of the probe is started with.
        probe_seconds: For how long it is asked; None starts no engine.
    """
    from mergekit_bio.eval.run.plan import to_document
    from mergekit_bio.eval.run.workload import count_tokens

    # 1. Count.
    document = to_document(plan)
    counted = count_tokens(plan)
    for cell in document["cells"]:
        tokens = counted and counted[cell["dataset"], cell["query"]]
        cell["prompt_tokens"] = tokens.prompt if tokens else None
        cell["answer_tokens_at_most"] = tokens.answer if tokens else None
    document["tokens_are_exact"] = all(tokens.exact for tokens in counted.values()) if counted else None
    # 2. Measure.
    measured = None
    if probe_seconds is not None:
        from mergekit_bio.eval.run.probe import probe, probe_document

        measured = probe(plan, settings, seconds=probe_seconds, listener=output)
        document["probe"] = probe_document(measured)

    # 3. Say it.
    def table(console: "Console") -> None:
        from rich import box

        columns = ("checkpoint", "dataset", "query", "clips", "answered", "prompt tokens")
        rows = table_of_numbers("", *columns, texts=2, box=box.SIMPLE_HEAD)
        for cell in document["cells"]:
            rows.add_row(*(_number(cell[column.replace(" ", "_")]) for column in columns))
        console.print(rows)
        if document["to_merge"]:
            console.print(f"to merge first: {', '.join(document['to_merge'])}")
        lines = [
            f"{_answers_in_words(document)} by the {plan.engine} engine, to {plan.out}",
            _tokens_in_words(document),
            *(_probe_in_words(measured) if measured else []),
            "nothing was written to the run's directory (--dry-run)"
            if measured
            else "nothing was merged, loaded or asked (--dry-run)",
        ]
        for line in lines:
            console.print(line, soft_wrap=True)

    output.result(document, table, [cell["file"] for cell in document["cells"]])


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "?" if value is None else str(value)


def _answers_in_words(document: dict[str, Any]) -> str:
    """How many answers are asked for: ``1,650 answers of 11 checkpoints to 1 query``."""
    checkpoints = len({cell["checkpoint"] for cell in document["cells"]})
    queries = len({(cell["dataset"], cell["query"]) for cell in document["cells"]})
    return (
        f"{document['answers']:,} answers of {checkpoints} checkpoint{'s'[: checkpoints != 1]} "
        f"to {queries} quer{'y' if queries == 1 else 'ies'}"
    )


def _tokens_in_words(document: dict[str, Any]) -> str:
    """Prompts and tokens of all cells together."""
    cells = document["cells"]
    prompts = f"{document['answers']:,} prompts"
    if document["tokens_are_exact"] is None:
        return f"{prompts}; their tokens cannot be counted: no tokenizer of the checkpoints is on this machine"
    about = "" if document["tokens_are_exact"] else "about "
    tokens, most = (sum(cell[key] for cell in cells) for key in ("prompt_tokens", "answer_tokens_at_most"))
    return f"{prompts} of {about}{tokens:,} tokens with their audio, answers of at most {most:,}"


def _probe_in_words(probe: "Probe") -> list[str]:
    """What was measured, and the hours."""
    lines = [f"the engine was up in {probe.start_seconds:.0f} s ({probe.checkpoint})"]
    if probe.clip_seconds:
        lines.append(f"{probe.clip_seconds:.3g} s to encode a clip, once for each of {probe.clips:,}")
    lines += [
        f"{query.dataset}, query {query.query}: {query.seconds:.3g} s a question, {query.asked} asked together;"
        f" {query.open:,} open"
        for query in probe.queries
    ]
    time = f"{probe.hours:.1f} hours" if probe.hours >= 1 else f"{60 * probe.hours:.2g} minutes"
    return [*lines, f"about {time} for the run with one engine, merging not counted"]


def print_fetch(plan: "RunPlan", output: "RunOutput", *, fetch: bool) -> None:
    """Say what is not on this machine, and fetch it.

    Args:
        plan: Of the run.
        output: The command's.
        fetch: Whether it is fetched, too.
    """
    from mergekit_bio.checkpoint.source import without_bars
    from mergekit_bio.eval.run.fetching import fetch_models, fetch_recordings, plan_fetch, to_document

    missing = plan_fetch(plan)
    document = {"recipe": plan.recipe.name, "fetched": fetch, **to_document(missing)}
    if fetch and missing.bytes:
        for part in _parts(document):
            output.note(f"to fetch: {part['what']}: {part['of']}, {human_bytes(part['bytes'])}")
        with without_bars() if output.quiet else nullcontext():
            fetch_models(missing.models)
        fetch_recordings(missing.recordings, output)

    def table(console: "Console") -> None:
        from rich import box

        rows = table_of_numbers("", "from", "", "fetched" if fetch else "to fetch", texts=2, box=box.SIMPLE_HEAD)
        for part in _parts(document):
            rows.add_row(part["what"], part["of"], human_bytes(part["bytes"]))
        if rows.row_count:
            console.print(rows)
        if fetch:
            console.print("all that the run reads is on this machine; HF_HUB_OFFLINE=1 keeps it from asking the Hub")
        else:
            console.print(f"{human_bytes(missing.bytes)} would be fetched (--dry-run)")

    output.result(document, table, [f"{part['bytes']} {part['what']}" for part in _parts(document)])


def _parts(document: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for every source."""
    models = [
        {"what": model["source"], "of": f"{model['files']} files", "bytes": model["bytes"]}
        for model in document["models"]
    ]
    recordings = [
        {
            "what": f"{data['source']}, {data['dataset']}",
            "of": f"{data['clips']} clips in {data['row_groups']} row groups",
            "bytes": data["bytes"],
        }
        for data in document["recordings"]
    ]
    return [*models, *recordings]
