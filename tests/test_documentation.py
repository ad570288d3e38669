"""README.md and docs/: every command, recipe and snippet runs, on tiny stand-ins under the names that the text uses.

Hub ids are folders here, which win over the hub. What serves for ever or takes minutes only has its options parsed.
"""

import ast
import csv
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))

LLAMA, NATURELM, BEANS_ZERO = (
    "meta-llama/Llama-3.1-8B-Instruct",
    "EarthSpeciesProject/NatureLM-audio",
    "EarthSpeciesProject/BEANS-Zero",
)
#: Fenced blocks that are only looked at.
PICTURES = ("text", "json", "mermaid")
#: Commands that run for ever, or for minutes: their options are parsed here, and tests of their own run them.
LONG = ("serve", "demo")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, or one command of it."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line} {' '.join(self.text.splitlines()[0].split('  #')[0].split())}"

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text, comments=True)


def blocks() -> Iterator[Block]:
    for page in PAGES:
        text = page.read_text()
        for found in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            yield Block(page, text.count("\n", 0, found.start()) + 2, found[1], found[2])


def in_language(language: str) -> list[Block]:
    return [block for block in blocks() if block.language == language]


def commands() -> Iterator[Block]:
    """The lines of sh blocks, continued ones joined."""
    for block in in_language("sh"):
        joined = re.sub(r"\\\n *", lambda found: " " * len(found[0]), block.text)
        start = 0
        for line in joined.splitlines():
            if shlex.split(line, comments=True):
                number = block.line + block.text.count("\n", 0, start)
                yield Block(block.page, number, "sh", line)
            start += len(line) + 1


COMMANDS = list(commands())
OURS = [command for command in COMMANDS if command.words[0] == "mergekit-bio"]


def is_merge_recipe(block: Block) -> bool:
    return not {"datasets", "extended", "model"} & yaml.safe_load(block.text).keys()


@pytest.fixture(scope="module")
def standins(tmp_path_factory: pytest.TempPathFactory, make_run: Callable[..., Path]) -> Path:
    """A folder with everything that the pages name and do not make."""
    import peft
    import transformers
    from tiny_naturelm import make_naturelm

    import mergekit_bio

    here = tmp_path_factory.mktemp("documentation")
    _write_llama(here / LLAMA)
    shutil.copytree(here / LLAMA, here / "my-llama")
    make_naturelm(here / NATURELM)
    for name in ("my-lora", "birds", "whales"):
        model = transformers.AutoModelForCausalLM.from_pretrained(here / LLAMA)
        settings = peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
        peft.get_peft_model(model, settings).save_pretrained(here / name)
    sources = {"base": here / LLAMA, "adapter": here / NATURELM, "fsync": False}
    mergekit_bio.merge(**sources, alphas=[0.5], out=here / "merged/half")
    mergekit_bio.merge(**sources, alphas=[0.4, 1.0], out=here / "sweep")
    for name in ("wren.wav", "a.flac", "b.mp3", "recordings/1.wav", "recordings/2.flac"):
        _write_recording(here / name)
    _write_beans_zero(here / BEANS_ZERO / "test.parquet")
    shutil.copytree(make_run(name="closed_set"), here / "runs/closed_set")
    if shared := os.environ.get("MERGEKIT_BIO_SHARED"):
        (here / "published").symlink_to(Path(shared, "published"))
    return here


def _write_llama(folder: Path) -> None:
    """A Llama whose answers end after a word or two."""
    from safetensors.torch import load_file, save_file
    from tiny_naturelm import make_base

    make_base(folder)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][json.loads((folder / "config.json").read_text())["eos_token_id"]] *= 10
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _write_recording(file: Path) -> None:
    import numpy as np
    import soundfile

    file.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(file, np.random.default_rng(len(file.name)).uniform(-0.5, 0.5, 16_000), 16_000)


def _write_beans_zero(file: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    file.parent.mkdir(parents=True)
    rows = [
        {
            "id": str(number),
            "dataset_name": "unseen-family-cmn",
            "audio": [0.1, -0.1] * 4000,
            "metadata": json.dumps({"sample_rate": 8000}),
            "instruction": "<Audio><AudioHere></Audio> What is it?",
            "output": label,
        }
        for number, label in enumerate(["Coruro", "Dall's Porpoise"])
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)


@pytest.fixture
def here(standins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own for one command, and no network."""
    import datasets
    from huggingface_hub import constants

    folder = shutil.copytree(standins, tmp_path / "here", copy_function=os.link, symlinks=True)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", standins.with_name(f"{standins.name}-datasets"))
    return folder


def _write_recipes(page: Path, here: Path) -> None:
    """The recipes that a page shows, under the names that its commands use."""
    for block in in_language("yaml"):
        if block.page == page and is_merge_recipe(block):
            (here / "merge.yaml").write_text(block.text)
        elif block.page == page and "my_recordings/" in block.text:
            (here / "my_birds.yaml").write_text(block.text)
    for block in in_language("csv"):
        _write_audio_folder(here / "my_recordings", block.text)


def _write_audio_folder(folder: Path, metadata: str) -> None:
    for row in csv.DictReader(metadata.splitlines()):
        _write_recording(folder / row["file_name"])
    (folder / "metadata.csv").write_text(metadata)


def _remove_outputs(words: list[str]) -> None:
    """What a command is about to make is not there yet."""
    named = [after for word, after in pairwise(words) if word in ("--out", "-o")]
    for output in map(Path, named + (words[-1:] if words[1:3] == ["recipes", "copy"] else [])):
        if output.is_dir():
            shutil.rmtree(output)
        else:
            output.unlink(missing_ok=True)


def _run(words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    from mergekit_bio.cli.app import main

    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ending:
        main()
    return ending.value.code


@pytest.mark.parametrize("command", [one for one in OURS if one.words[1] not in LONG], ids=str)
def test_a_command_of_ours_runs_as_it_stands(
    command: Block, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = command.words
    if "published" in command.text and not (here / "published").exists():
        pytest.skip("the published predictions are not at hand (MERGEKIT_BIO_SHARED)")
    _write_recipes(command.page, here)
    _remove_outputs(words)
    if words[1] == "eval" and "--engine" not in words:
        words += ["--engine", "transformers", "--engine-option", "device=cpu"]  # vLLM wants a process of its own
    code = _run(words, monkeypatch)
    assert code in (0, None), capsys.readouterr().err
    assert "vllm" not in sys.modules


@pytest.mark.parametrize("command", [one for one in OURS if one.words[1] in LONG], ids=str)
def test_the_options_of_a_long_command_exist(command: Block) -> None:
    from typer.main import get_command

    from mergekit_bio.cli.app import app

    name, *arguments = command.words[1:]
    get_command(app).commands[name].make_context(name, arguments)


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_serve_comes_as_far_as_vllms_server_as_it_stands(here: Path) -> None:
    lines = [command.words for command in OURS if command.words[1] == "serve"]
    program = (
        "import json, sys\n"
        "from vllm.entrypoints.cli.serve import ServeSubcommand\n"
        "from mergekit_bio.cli.app import main\n"
        "ServeSubcommand.cmd = lambda arguments: print('serving', *arguments.served_model_name)\n"
        "for sys.argv in json.loads(sys.argv[1]):\n"
        "    try: main()\n"
        "    except SystemExit as ending: assert not ending.code, sys.argv\n"
    )
    done = subprocess.run([sys.executable, "-c", program, json.dumps(lines)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("serving") == len(lines) > 0


def _check_make(words: list[str], here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for word in words[1:]:
        name, equals, value = word.partition("=")
        if equals:
            assert name == "EXTRAS"
            assert set(value.split(",")) <= _extras()
        else:
            assert word in targets


def _check_pip(words: list[str], here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert words[1] == "install"
    if "--extra-index-url" in words:
        option = words.index("--extra-index-url")
        del words[option : option + 2]
    for word in words[2:]:
        named = re.fullmatch(r"(?:\.|mergekit-bio|dist/\*\.whl)(?:\[([\w,-]+)\])?", word)
        assert named and (named[1] is None or set(named[1].split(",")) <= _extras()), word


def _check_script(words: list[str], here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts that measure for minutes are only started to print their help."""
    script = ROOT / words[1]
    arguments = words[2:] if "published/" in words else ["--help"]
    if "published/" in words and not (here / "published").exists():
        pytest.skip("the published predictions are not at hand (MERGEKIT_BIO_SHARED)")
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as ending:
        assert not ending.code


def test_pip_check_names_only_what_is_left_out() -> None:
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)

    left_out = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["uv"]["exclude-dependencies"]
    for line in done.stdout.splitlines():
        missing = re.fullmatch(r"\S+ \S+ requires (\S+), which is not installed\.", line)
        assert line == "No broken requirements found." or (missing and missing[1] in left_out), line
    (sentence,) = re.findall(r"leaves out\n(.*?), which vLLM", (ROOT / "README.md").read_text())
    assert sorted(re.findall(r"torch\w+", sentence)) == left_out


CHECKS = {"make": _check_make, "pip": _check_pip, "python": _check_script}


def _extras() -> set[str]:
    return set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])


@pytest.mark.parametrize("command", [one for one in COMMANDS if one not in OURS], ids=str)
def test_any_other_command_is_checked(command: Block, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert command.words[0] in CHECKS, f"{command}: nothing here checks such a command; add a check, or leave it out"
    CHECKS[command.words[0]](command.words, here, monkeypatch)


@pytest.mark.parametrize("block", in_language("python"), ids=str)
def test_a_python_block_runs_as_it_stands(block: Block, here: Path) -> None:
    import torch

    _remove_outputs(["--out", *re.findall(r'out="(.+?)"', block.text)])
    names = {"waveform": torch.rand(1, 160_000, generator=torch.Generator().manual_seed(0)) - 0.5}
    exec(compile("\n" * (block.line - 1) + block.text, block.page, "exec"), names)


@pytest.mark.parametrize("block", in_language("yaml"), ids=str)
def test_a_yaml_block_is_what_the_code_reads(block: Block, here: Path) -> None:
    from mergekit_bio.eval.recipe import load_recipe
    from mergekit_bio.merging.request import read_request

    file = here / "block.yaml"
    file.write_text(block.text)
    if is_merge_recipe(block):
        assert read_request(file, {}).strengths
    else:
        assert load_recipe(file).recipe.datasets


@pytest.mark.parametrize("block", in_language("csv"), ids=str)
def test_a_csv_block_describes_recordings(block: Block, here: Path) -> None:
    from mergekit_bio.eval.audio_folder import open_audio_folder

    _write_audio_folder(here / "folder", block.text)
    assert open_audio_folder(here / "folder", name="folder", task="classification").clips


def test_every_block_says_what_it_is() -> None:
    found = list(blocks())
    assert [str(block) for block in found if block.language not in {"sh", "python", "yaml", "csv", *PICTURES}] == []
    assert sum(page.read_text().count("```") for page in PAGES) == 2 * len(found), "a fence that is not read here"


def _recipe_keys() -> set[str]:
    from mergekit_bio.eval.recipe import Generate, Recipe

    return {f"generate.{one.name}" for one in fields(Generate)} | {one.name for one in fields(Recipe)} - {"generate"}


def _merge_keys() -> set[str]:
    from mergekit_bio.merging.request import MergeRequest

    return set(MergeRequest.model_fields)


def _manifest_keys() -> set[str]:
    from mergekit_bio.merging.manifest import Manifest

    return set(Manifest.model_fields)


def _rounding_keys() -> set[str]:
    from mergekit_bio.merging.manifest import LossRecord

    return set(LossRecord.model_fields)


def _scorers() -> set[str]:
    from mergekit_bio.eval.matching import SCORERS

    return set(SCORERS)


@pytest.mark.parametrize(
    ("page", "section", "keys"),
    [
        ("recipes.md", "Merge recipe", _merge_keys),
        ("recipes.md", "Evaluation recipe", _recipe_keys),
        ("checkpoint.md", "merge.json", _manifest_keys),
        ("checkpoint.md", "Rounding figures", _rounding_keys),
        ("scoring.md", "From text to label", _scorers),
    ],
)
def test_a_reference_table_names_every_key(page: str, section: str, keys: Callable[[], set[str]]) -> None:
    (text,) = re.findall(rf"^#+ {section}\n(.*?)(?=^#)", (ROOT / "docs" / page).read_text() + "\n#", re.M | re.S)
    named = [name for cell in re.findall(r"^\| (.+?) \|", text, re.M) for name in re.findall(r"`(.+?)`", cell)]
    assert sorted(named) == sorted(keys())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    def anchors(file: Path) -> set[str]:
        titles = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}

    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" not in link:
            path, _, anchor = link.partition("#")
            file = page.parent / path if path else page
            assert file.exists(), link
            assert not anchor or anchor in anchors(file), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_prose_names_commands_that_exist(page: Path) -> None:
    from typer.main import get_command

    from mergekit_bio.cli.app import app

    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for program, name in re.findall(r"`(mergekit-bio|make) ([\w-]+)", page.read_text()):
        assert name in (get_command(app).commands if program == "mergekit-bio" else targets) or name[:2] == "--", name


def test_imports_go_the_way_that_the_architecture_page_says() -> None:
    (line,) = (line for line in (ROOT / "docs/architecture.md").read_text().splitlines() if line.startswith("cli > "))
    layers = [layer.split(", ") for layer in line.split(" > ")]
    level = {name: number for number, layer in enumerate(layers) for name in layer}

    def part(module: str) -> str:
        names = module.split(".")[1:3]
        return ".".join(names) if names[0] == "hub" and len(names) == 2 else names[0]

    package = ROOT / "mergekit_bio"
    assert {name.partition(".")[0] for name in level} == {
        path.stem
        for path in package.iterdir()
        if (path / "__init__.py").exists() or path.name in ("errors.py", "diagnosis.py")
    }
    for file in package.glob("*/**/*.py"):
        importer = part(".".join(file.relative_to(ROOT).with_suffix("").parts))
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mergekit_bio."):
                imported = part(node.module)
                assert imported == importer or level[imported] > level[importer], f"{file} imports {node.module}"
