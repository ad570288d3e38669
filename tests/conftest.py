"""Fixtures that more than one folder of tests uses."""

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

if TYPE_CHECKING:
    from hub.server import Hub

# vLLM in the tests' own process, without what takes long to start. Read by torch and vLLM when they are imported.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

# How long an example takes says how busy the machine is; what hangs is caught by pytest's own timeout. The suite tries
# the same examples every time, so that a change is judged by what it does; --hypothesis-profile=random tries others.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True)
hypothesis.settings.register_profile("random", deadline=None)
hypothesis.settings.load_profile("suite")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--count", type=int, help="how often a repeated test repeats, instead of its own numbers")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give ``count`` its values: of ``@repeated(few, many)`` the many, if there are any, belong to the long tests."""
    marker = metafunc.definition.get_closest_marker("repeated")
    if marker is None or "count" not in metafunc.fixturenames:
        return
    few, *many = marker.args
    asked = metafunc.config.getoption("--count")
    counts = [asked] if asked else [few, *(pytest.param(number, marks=pytest.mark.long) for number in many)]
    metafunc.parametrize("count", counts, ids="{} times".format, scope="module")


def _shared(folder: str) -> Path:
    root = os.environ.get("MERGEKIT_BIO_SHARED")
    if not root:
        pytest.skip("MERGEKIT_BIO_SHARED is not set: the reference data is not at hand")
    return Path(root) / folder


@pytest.fixture
def command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """``mergekit-bio`` in this process with the words given; returns exit code, stdout and stderr."""
    from mergekit_bio.cli.app import main

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["mergekit-bio", *map(str, words)])
        with pytest.raises(SystemExit) as ending:
            main()
        out, err = capsys.readouterr()
        return ending.value.code or 0, out, err

    return run


@pytest.fixture(scope="session")
def golden() -> Path:
    """Reference tensors, tokens and tiny checkpoints made by the reference implementation."""
    return _shared("golden")


@pytest.fixture(scope="session")
def published() -> Path:
    """The paper's published predictions and the scores they must give."""
    return _shared("published")


@pytest.fixture(scope="session")
def cases() -> Path:
    """Files as users have them: recordings whose headers lie."""
    return _shared("cases")


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache for this process, which is offline."""
    from huggingface_hub import constants

    cache = tmp_path / "hf-cache"
    cache.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return cache


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator["Hub"]:
    """A hub that this process' huggingface_hub talks to, logged in as ``owl``, with an empty cache."""
    from hub.server import running_hub
    from huggingface_hub import constants

    with running_hub() as hub:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf-cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", "hf_owl")
        # The client waits for seconds between its retries.
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
        yield hub


@pytest.fixture
def published_models(golden: Path, hub_cache: Path) -> tuple[Path, Path]:
    """The default base and adapter in the cache, small, in the layout in which they are published; their snapshots."""
    from hub_cache import ADAPTER, ADAPTER_REVISION, BASE, BASE_REVISION, put_in_cache

    base = put_in_cache(hub_cache, BASE, BASE_REVISION, golden / "llama-tiny")
    return base, put_in_cache(hub_cache, ADAPTER, ADAPTER_REVISION, golden / "naturelm-tiny-published")


@pytest.fixture(scope="session")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small merged model with ears, bf16 Llama and float32 tower; its sources lie beside it."""
    import torch
    from tiny_naturelm import make_base, make_naturelm, random_prefix

    import mergekit_bio

    root = tmp_path_factory.mktemp("merged")
    make_base(root / "llama", dtype=torch.bfloat16)
    make_naturelm(root / "naturelm", prefix=random_prefix())
    (result,) = mergekit_bio.merge(
        base=root / "llama", adapter=root / "naturelm", alphas=[0.5], out=root / "alpha-0.50", device="cpu"
    )
    return result.path


@pytest.fixture(scope="session")
def make_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a finished evaluation run: a sweep whose middle alpha is best."""
    from mergekit_bio.eval.records.cell import Cell
    from mergekit_bio.eval.records.predictions import Prediction
    from mergekit_bio.eval.records.run_directory import RunDirectory, RunRecord, cell_file_name

    labels = ("Coruro", "Great <b>Grig</b>", "Wild Boar & Sons")

    def make(
        *, name: str = "frogs", alphas: tuple[float, ...] = (0.0, 0.5, 1.0), clips: int = 60, rows: int = 0, **extra
    ) -> Path:
        generator = random.Random(0)
        cells = tuple(
            Cell(
                file=cell_file_name(dataset="frogs", query=0, checkpoint=f"alpha {alpha}", alpha=alpha),
                dataset="frogs",
                task="classification",
                query=0,
                checkpoint=f"alpha {alpha}",
                alpha=alpha,
                rows=rows or clips,
                identity={"seed": 0},
                query_text="What is it?\nOne of: {species_list}",
            )
            for alpha in alphas
        )
        path = tmp_path_factory.mktemp("runs") / name
        record = RunRecord(name=name, recipe={}, scorer="exact", cells=cells)
        with RunDirectory(path, record) as run:
            for cell in cells:
                chance = 0.9 - abs(cell.alpha - 0.5)
                with run.writer(cell) as writer:
                    for number in range(clips):
                        label = labels[number % 3]
                        text = label if generator.random() < chance else generator.choice([*labels, "no idea"])
                        writer.append(
                            Prediction(
                                prediction=text,
                                label=label,
                                id=f"clip{number}",
                                dataset_name="frogs",
                                prompt=f"<|user|>What? </script> {number}",
                                lora_scale=cell.alpha,
                                **extra,
                            )
                        )
        return path

    return make
