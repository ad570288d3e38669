"""The demo, stage by stage, through the functions behind the commands that a user would type."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_bio.demo.species import HEARD, UNHEARD
from mergekit_bio.engine.choice import choose_engine
from mergekit_bio.engine.interface import EngineSettings
from mergekit_bio.engine.slot import EngineSlot
from mergekit_bio.errors import OutputError
from mergekit_bio.eval.run.evaluate import carry_out, prepare_run
from mergekit_bio.eval.run.progress import ProgressListener

if TYPE_CHECKING:
    from mergekit_bio.eval.report.build import Report

MODEL = Path(__file__).with_name("model")
#: The recipes asked: the narrow prompt of fine-tuning, then what asks for more.
NAMED, COMBINED, CLOSED, IN_CONTEXT = RECIPES = ("demo_named", "demo_combined", "demo", "demo_in_context")
EACH_HEARD, EACH_UNHEARD = 6, 30
_MOST_AUDIOS = 4
#: One process, and a cache (in GiB) that leaves a laptop its memory.
_VLLM_ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}


def write_sources(folder: Path, listener: ProgressListener) -> None:
    """Put the model, its fine-tune, the recordings and the recipes into a new folder.

    Raises:
        OutputError: The folder is there already.
    """
    from mergekit_bio.demo.recordings import write_recordings
    from mergekit_bio.eval.recipe.shipped import copy_shipped

    try:
        folder.mkdir(parents=True)
    except FileExistsError as error:
        raise OutputError(f"{folder}: exists already; choose another --out") from error
    try:
        for part in ("base", "adapter"):
            shutil.copytree(MODEL / part, folder / part)
        for recipe in RECIPES:
            copy_shipped(recipe, folder)
        count = len(HEARD) * EACH_HEARD + len(UNHEARD) * EACH_UNHEARD
        with listener.progress("recording", count, "clips") as advance:
            write_recordings(folder / "recordings/heard", HEARD, each=EACH_HEARD, seed=1, progress=advance)
            write_recordings(
                folder / "recordings/unheard", UNHEARD, each=EACH_UNHEARD, seed=2, label="scientific", progress=advance
            )
    except BaseException:  # a package that is missing, a disk that is full, Ctrl-C: the next try finds no obstacle
        shutil.rmtree(folder, ignore_errors=True)
        raise


@contextmanager
def shared_engine(
    name: str | None, folder: Path, listener: ProgressListener, *, quiet: bool = False
) -> Iterator[EngineSlot]:
    """One engine for all recipes, started on the first checkpoint that is asked."""
    for variable, value in _VLLM_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    engine, note = choose_engine(name)
    if note:
        listener.note(f"note: {note}")
    options: dict[str, Any] = {"dtype": "float32"}
    if engine.name == "vllm":
        # A model this small gains nothing from compiling, and a laptop has little memory for vLLM's cache.
        options |= {"enforce_eager": True, "max_model_len": 1024}
    settings = EngineSettings(options=options, max_audios=_MOST_AUDIOS, prefixes=folder / "prefixes", quiet=quiet)
    with EngineSlot(engine, settings) as slot:
        yield slot
    shutil.rmtree(folder / "prefixes", ignore_errors=True)


def ask(recipe: str, folder: Path, slot: EngineSlot, listener: ProgressListener) -> None:
    """Run one of ``RECIPES`` in ``folder``; its predictions go to ``runs/RECIPE`` there."""
    plan = prepare_run(
        recipe=folder / f"{recipe}.yaml", out=folder / "runs" / recipe, engine=slot.name, listener=listener
    )
    carry_out(plan, slot.settings, listener=listener, slot=slot)


@dataclass(frozen=True)
class Point:
    """One strength of the curve.

    Attributes:
        accuracy: Recipe -> (value, low, high): exact answers, with the 95% interval over clips.
        in_set: Share of the answers to ``demo``, the closed set, that are on its list.
    """

    alpha: float
    accuracy: dict[str, tuple[float, float, float]]
    in_set: float


def curve(report: "Report") -> list[Point]:
    """The four recipes' accuracy at every strength, and how far the closed set was kept to."""
    scores = {sweep.cell.run: {item.cell.alpha or 0.0: item for item in sweep.scores} for sweep in report.sweeps}
    return [
        Point(
            alpha=alpha,
            accuracy={
                run: (by_alpha[alpha].metrics["accuracy"], *by_alpha[alpha].intervals["accuracy"])
                for run, by_alpha in scores.items()
            },
            in_set=1 - closed.metrics["out_of_set"],
        )
        for alpha, closed in scores[CLOSED].items()
    ]
