"""What ``eval --fetch-only`` says: how much is fetched, from where."""

from typing import TYPE_CHECKING, Any

from mergekit_bio.cli.console import human_bytes, table_of_numbers

if TYPE_CHECKING:
    from rich.console import Console

    from mergekit_bio.cli.run_progress import RunOutput
    from mergekit_bio.eval.run.plan import RunPlan


def print_fetch(plan: "RunPlan", output: "RunOutput", *, fetch: bool) -> None:
    """Say what is not on this machine, and fetch it.

    Args:
        plan: Of the run.
        output: The command's.
        fetch: Whether it is fetched, too.
    """
    from mergekit_bio.eval.run.fetching import fetch_models, fetch_recordings, plan_fetch, to_document

    missing = plan_fetch(plan)
    document = {"recipe": plan.recipe.name, "fetched": fetch, **to_document(missing)}
    if fetch and missing.bytes:
        for part in _parts(document):
            output.note(f"to fetch: {part['what']}: {part['of']}, {human_bytes(part['bytes'])}")
        fetch_models(missing.models)
        fetch_recordings(missing.recordings, output)

    def table(console: "Console") -> None:
        from rich import box

        rows = table_of_numbers("", "from", "", "fetched" if fetch else "to fetch", texts=2, box=box.SIMPLE_HEAD)
        for part in _parts(document):
            rows.add_row(part["what"], part["of"], human_bytes(part["bytes"]))
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
