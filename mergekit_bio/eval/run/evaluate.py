"""An evaluation run from recipe to predictions: merge what is missing, ask every checkpoint, go on where it stopped."""

import platform
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_bio.checkpoint.identity import weights_identity
from mergekit_bio.checkpoint.source import resolve
from mergekit_bio.engine.choice import choose_engine, engine_class, engine_of_api
from mergekit_bio.engine.interface import EngineSettings
from mergekit_bio.engine.pool import OneWorker
from mergekit_bio.engine.ray_pool import cluster_for
from mergekit_bio.engine.slot import EngineSlot
from mergekit_bio.errors import DatasetError, EngineError
from mergekit_bio.eval.label_map import missing_names
from mergekit_bio.eval.recipe.schema import load_recipe
from mergekit_bio.eval.recipe.shipped import find_recipe
from mergekit_bio.eval.records.run_directory import RunDirectory, RunRecord
from mergekit_bio.eval.run.asking import OwnEngine, RunWorker
from mergekit_bio.eval.run.batches import ask_all
from mergekit_bio.eval.run.checkpoints import merge_missing, recipe_for, recipe_for_baseline, run_checkpoints
from mergekit_bio.eval.run.fetching import fetch_recordings, missing_recordings
from mergekit_bio.eval.run.headers import check_headers
from mergekit_bio.eval.run.plan import RunPlan, asked_now, identified_cells, plan_run
from mergekit_bio.eval.run.progress import ProgressListener, SilentListener
from mergekit_bio.eval.run.questions import options, query_numbers

if TYPE_CHECKING:
    from mergekit_bio.eval.report.build import Report

PREFIXES = "prefixes"
#: Distributions whose versions every run records, beside its engine's own.
_PACKAGES = ("mergekit-bio", "torch", "datasets", "numpy")


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        path: Its directory.
        record: The content of its run.json.
    """

    path: Path
    record: RunRecord

    def report(self, *, scorer: str | None = None) -> "Report":
        """Score the predictions; by default with the scorer that the recipe asks for."""
        from mergekit_bio.eval.records.read import read_runs
        from mergekit_bio.eval.report.build import build_report

        return build_report(read_runs([self.path]), scorer=scorer)


def evaluate(
    *,
    recipe: str | Path,
    out: str | Path | None = None,
    models: Sequence[str | Path] = (),
    alphas: Sequence[float | str] = (),
    data: str | Path | None = None,
    engine: str | None = None,
    servers: Sequence[str] = (),
    api: str | None = None,
    model_name: str | None = None,
    api_key: str | None = None,
    engine_options: Mapping[str, Any] | None = None,
    limit: int | None = None,
    workers: int | None = None,
    ray: str | None = None,
    listener: ProgressListener | None = None,
) -> Run:
    """Run a recipe, or go on with a run of it.

    Predictions are appended to files in the run directory as they come. A run that was stopped, whichever way, goes
    on when it is called again with the same arguments.

    Args:
        recipe: A YAML file, or the name of a recipe that comes with the package.
        out: The run directory; by default ``runs/NAME``.
        models: Directories (of a checkpoint or of a sweep) or hub ids, instead of the recipe's checkpoints.
        alphas: Numbers and sweeps ``"0:1:0.1"``, instead of the recipe's.
        data: Where BEANS-Zero is, instead of where the recipe says: a folder, a file or a hub id.
        engine: One of :data:`mergekit_bio.engine.choice.ENGINES`; by default the first that is installed.
        servers: Addresses for an engine that asks servers, which offer every checkpoint under its directory's name.
        api: What the servers speak, one of :data:`mergekit_bio.engine.choice.APIS`; by default our own.
        model_name: The one model of the servers to ask, instead of the recipe's checkpoints.
        api_key: The servers' key.
        engine_options: More arguments for the engine, such as ``dtype``.
        limit: Ask about the first so many clips of every dataset only.
        workers: Engines that answer, each in a process of its own, on Ray; by default one for every GPU, if Ray is
            installed. A run may go on with another number.
        ray: The address of a running Ray cluster, or ``"auto"``; by default Ray is started on this machine.
        listener: Hears how it goes.

    Raises:
        MergekitBioError: With one line that says what is wrong, where, and what to do. Answers so far are kept.
    """
    listener = listener or SilentListener()
    plan = prepare_run(
        recipe=recipe, out=out, models=models, alphas=alphas, data=data, engine=engine, servers=servers, api=api,
        model_name=model_name, limit=limit, listener=listener,
    )  # fmt: skip
    settings = EngineSettings(options=engine_options or {}, servers=tuple(servers), api_key=api_key)
    return Run(plan.out, carry_out(plan, settings, listener=listener, workers=workers, ray=ray))


def prepare_run(
    *,
    recipe: str | Path,
    out: str | Path | None = None,
    models: Sequence[str | Path] = (),
    alphas: Sequence[float | str] = (),
    data: str | Path | None = None,
    engine: str | None = None,
    servers: Sequence[str] = (),
    api: str | None = None,
    model_name: str | None = None,
    limit: int | None = None,
    listener: ProgressListener | None = None,
    fetch: bool = True,
    check_access: bool = False,
) -> RunPlan:
    """Everything of ``evaluate`` that comes before a checkpoint is made or loaded.

    Args:
        fetch: Download checkpoints that are hub ids.
        check_access: Where they are not downloaded, make sure that they could be.

    Raises:
        MergekitBioError: See ``evaluate``.
    """
    listener = listener or SilentListener()
    loaded = load_recipe(find_recipe(str(recipe)), data=data)
    chosen, note = choose_engine(engine_of_api(engine, api), servers=servers)
    resolved = recipe_for(loaded.recipe, models=models, alphas=alphas, served=model_name)
    if chosen.baseline:
        resolved, greedy = recipe_for_baseline(resolved, named=model_name is not None)
        note = note or greedy
    elif model_name is not None and not chosen.remote:
        raise EngineError(f"--model-name {model_name}: is a model of servers; name them with --server")
    for text in (*loaded.notes, *([note] if note else [])):
        listener.note(f"note: {text}")
    folder = Path("runs") / resolved.name if out is None else Path(out)
    checkpoints = run_checkpoints(resolved, out=folder, served=chosen.remote, fetch=fetch, check_access=check_access)
    plan = plan_run(resolved, checkpoints, out=folder, engine=chosen.name, limit=limit)
    for dataset in plan.datasets:
        for text in dataset.notes:
            listener.note(f"note: {text}")
    # Generated answers are scored later, and the report tells of missing names; options are chosen among now.
    for dataset in plan.datasets if resolved.decoding != "generate" else ():
        for query in query_numbers(resolved):
            target, labels = resolved.target(query, dataset.name), [row.label for row in dataset.asked]
            missing = missing_names(labels, target=target, names=resolved.label_map)
            if missing:
                listener.note(f"note: {dataset.name}, query {query}: {missing}")
    return plan


def carry_out(
    plan: RunPlan,
    settings: EngineSettings,
    *,
    listener: ProgressListener,
    slot: EngineSlot | None = None,
    workers: int | None = None,
    ray: str | None = None,
) -> RunRecord:
    """Merge what is missing and ask every checkpoint.

    Args:
        plan: Of :func:`prepare_run`.
        settings: What the engine is started with; the run adds what it needs itself.
        listener: Is told how it goes.
        slot: One that several runs share, for as many audios as any of them needs, with the settings that it was made
            with; by default the run has its own.
        workers: See :func:`evaluate`; with a slot there is one.
        ray: See :func:`evaluate`.

    Raises:
        MergekitBioError: See :func:`evaluate`. Answers so far are kept.
    """
    engine = engine_class(plan.engine)
    shared = slot is not None
    if slot is not None:
        settings = slot.settings
    with ExitStack() as stack:
        # 1. Who will answer: one engine in this process, or Ray's workers with one each.
        cluster = None
        if slot is None:
            cluster = stack.enter_context(
                cluster_for(engine, settings.options, workers=workers, address=ray, note=listener.note)
            )
        # 2. Fetch the recordings that are heard, look at them, and merge.
        fetch_recordings(missing_recordings(plan), listener)
        unheard = check_headers(plan, listener)
        if plan.recipe.merge is not None and not engine.remote:
            merged = merge_missing(
                plan.checkpoints,
                merge=plan.recipe.merge,
                out=plan.out,
                progress=listener.progress,
                note=listener.note,
            )
            if merged:
                listener.note(f"merged: {', '.join(checkpoint.name for checkpoint in merged)}")
        # One cell uses every prefix once; for more, or for several engines, they are kept on the disk, until the run is
        # complete.
        many = len(plan.cells) > len(plan.datasets) or cluster is not None
        prefixes = plan.out / PREFIXES if not shared and not engine.remote and many else None
        if not shared:
            settings = replace(settings, max_audios=plan.max_audios, prefixes=prefixes)
        if slot is None and cluster is None:
            slot = stack.enter_context(EngineSlot(engine, settings))
        # 3. Write down what decides the answers; a run of another configuration is refused here.
        weights = {
            checkpoint: {"served": slot.revision(checkpoint.source)}
            if engine.remote and slot is not None
            else weights_identity(resolve(checkpoint.source).path)
            for checkpoint in plan.checkpoints
        }
        if plan.recipe.decoding == "loglikelihood" and engine.remote and slot is not None:
            _check_lists(plan, slot)
        dtype = settings.options.get("dtype")
        dtype = None if dtype in (None, "auto") else str(dtype)
        cells = identified_cells(plan, weights=weights, dtype=dtype, baseline=engine.baseline)
        wanted = RunRecord(
            name=plan.recipe.name,
            recipe=asdict(plan.recipe),
            scorer=plan.recipe.scorer,
            cells=cells,
            label_map=plan.recipe.label_map,
            environment=_environment(plan, settings, workers=cluster.count if cluster else 1),
        )
        # 4. Ask.
        at_once = engine.prompts_at_once(settings)
        asked = asked_now(plan)
        run = stack.enter_context(RunDirectory(plan.out, wanted, asked))
        for text in run.notes:
            listener.note(f"note: {text}")
        ask = partial(ask_all, plan, run, listener=listener, at_once=at_once, asked=asked, unheard=unheard)
        if slot is not None:
            with closing(RunWorker(plan, slot)) as worker:
                left_open = ask(OneWorker(worker))
            for text in worker.notes():
                listener.note(f"note: {text}")
        elif cluster is not None:
            with cluster.workers(partial(OwnEngine, plan, settings)) as pool:
                left_open = ask(pool)
            if left_open.given_up:
                given_up = left_open.given_up
                missing = sum(len(batch.places) for batch in given_up)
                raise EngineError(
                    f"{plan.out}: {missing} of {plan.rows} answers are missing, because workers died when they were "
                    f"asked: {'; '.join(map(str, given_up[:3]))}{'; ...' * (len(given_up) > 3)}. All others are there; "
                    "run the command again to ask what is missing"
                )
        # 5. Recordings that are no use do not hold up the others, but they are not forgotten.
        if left_open.questions:
            number = len(left_open.unheard)
            recordings = "1 recording" if number == 1 else f"{number} recordings"
            said = (
                f"{plan.out}: {left_open.questions} of {plan.rows} answers are missing, because {recordings} cannot be "
                "heard; mend what is named above and give the same command again: what is answered is not asked again"
            )
            if left_open.questions == plan.rows:
                raise DatasetError(f"{said} ({next(iter(left_open.unheard.values()))})")
            listener.warn(f"note: {said}")
        elif prefixes is not None:
            shutil.rmtree(prefixes, ignore_errors=True)
        return run.record


def _check_lists(plan: RunPlan, slot: EngineSlot) -> None:
    """Refuse, before anything is written, labels that the servers do not score.

    Raises:
        EngineError: A server scores no labels, or not so many.
    """
    scorer = slot.at(plan.checkpoints[-1].source)
    for dataset in plan.datasets:
        for query in query_numbers(plan.recipe):
            scorer.loglikelihood([], options(plan.recipe, dataset, query))


def _environment(plan: RunPlan, settings: EngineSettings, *, workers: int) -> dict[str, Any]:
    """What a reader of the record may want to know and the predictions should not depend on."""
    versions = {}
    for package in (*_PACKAGES, *engine_class(plan.engine).packages):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "python": platform.python_version(),
        "machine": platform.platform(),
        "engine": {
            "name": plan.engine,
            "options": {key: str(value) for key, value in settings.options.items()},
            **({"servers": list(settings.servers)} if settings.servers else {}),
        },
        "workers": workers,
        "checkpoints": {checkpoint.name: checkpoint.source for checkpoint in plan.checkpoints},
        "data": {dataset.name: dataset.source for dataset in plan.datasets},
    }
