"""What README.md and docs/ show and say beside commands: snippets run, recipes are read, tables and links are right."""

import ast
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
from documentation.pages import CLIENTS, PAGES, ROOT, Block, blocks, in_language, is_merge_recipe
from documentation.standins import write_audio_folder

#: Fenced blocks that are only looked at.
PICTURES = ("text", "json", "mermaid")
RUN_OR_READ = ("sh", "bash", "python", "yaml", "csv")


@pytest.mark.parametrize("block", [block for block in in_language("python") if block not in CLIENTS], ids=str)
def test_a_python_block_runs_as_it_stands(block: Block, here: Path) -> None:
    import torch

    for output in re.findall(r'out="(.+?)"', block.text):
        shutil.rmtree(here / output)
    names = {"waveform": torch.rand(1, 160_000, generator=torch.Generator().manual_seed(0)) - 0.5}
    exec(compile("\n" * (block.line - 1) + block.text, block.page, "exec"), names)


@pytest.mark.parametrize("block", CLIENTS, ids=str)
def test_what_is_shown_of_other_clients_is_what_was_run(block: Block) -> None:
    """Their packages are not installed here; `python eval/clients.py` runs these lines and records them."""
    recorded = (ROOT / "eval/results/clients.md").read_text()
    assert " ".join(block.text.split()) in " ".join(recorded.split())


def test_the_service_and_the_container_give_options_that_there_are(tmp_path: Path) -> None:
    from typer.main import get_command

    from mergekit_bio.cli.app import app

    deploy = ROOT / "docs/deploy"
    unit = (deploy / "mergekit-bio.service").read_text()
    (command,) = re.findall(r"^ExecStart=\S+/mergekit-bio serve (.*)$", unit, re.M)
    (container,) = re.findall(r"^CMD (.*)$", (deploy / "Containerfile").read_text(), re.M)
    assert json.loads(container) == ["serve", "--host", "0.0.0.0"]
    ours = {name for option in get_command(app).commands["serve"].params for name in option.opts}
    given = {word for word in command.split() if word.startswith("--")}
    assert given - ours == {"--port"}  # vLLM's
    if (program := shutil.which("systemd-analyze")) is None:
        pytest.skip("systemd-analyze is not installed")
    tried = tmp_path / "mergekit-bio.service"
    tried.write_text(re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", unit, flags=re.M))
    done = subprocess.run([program, "verify", "--man=no", tried], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("block", in_language("yaml"), ids=str)
def test_a_yaml_block_is_what_the_code_reads(block: Block, here: Path) -> None:
    from mergekit_bio.eval.recipe.schema import load_recipe
    from mergekit_bio.merging.request import read_request

    file = here / "block.yaml"
    file.write_text(block.text)
    if is_merge_recipe(block):
        assert read_request(file, {}).strengths
    else:
        assert load_recipe(file).recipe.datasets


@pytest.mark.parametrize("block", in_language("csv"), ids=str)
def test_a_csv_block_describes_recordings(block: Block, here: Path) -> None:
    from mergekit_bio.eval.data.audio_folder import open_audio_folder

    write_audio_folder(here / "folder", block.text)
    assert open_audio_folder(here / "folder", name="folder", task="classification").asked


def test_every_block_says_what_it_is() -> None:
    found = list(blocks())
    assert [str(block) for block in found if block.language not in {*RUN_OR_READ, *PICTURES}] == []
    assert sum(page.read_text().count("```") for page in PAGES) == 2 * len(found), "a fence that is not read here"


def _recipe_keys() -> set[str]:
    from mergekit_bio.eval.recipe.schema import Generate, Recipe

    return {f"generate.{one.name}" for one in fields(Generate)} | {one.name for one in fields(Recipe)} - {"generate"}


def _merge_keys() -> set[str]:
    from mergekit_bio.merging.request import MergeRequest

    return {field.name for field in fields(MergeRequest)}


def _manifest_keys() -> set[str]:
    from mergekit_bio.checkpoint.manifest import Manifest

    return {field.name for field in fields(Manifest)}


def _rounding_keys() -> set[str]:
    from mergekit_bio.checkpoint.manifest import RoundingLoss

    return {field.name for field in fields(RoundingLoss)}


def _scorers() -> set[str]:
    from mergekit_bio.eval.scoring.scorers import SCORERS

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


@pytest.mark.parametrize(("package", "first"), [("mergekit_bio", "cli"), ("mergekit_bio.eval", "run")])
def test_imports_go_the_way_that_the_architecture_page_says(package: str, first: str) -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    (line,) = (line for line in text.splitlines() if line.startswith(f"{first} > "))
    level = {name: number for number, layer in enumerate(line.split(" > ")) for name in layer.split(", ")}

    def part(module: str) -> str:
        return module.removeprefix(f"{package}.").split(".")[0]

    folder = ROOT / package.replace(".", "/")
    files = [file for file in folder.rglob("*.py") if file != folder / "__init__.py"]
    assert {name.partition(".")[0] for name in level} == {
        file.relative_to(folder).parts[0].split(".")[0] for file in files
    }
    for file in files:
        importer = part(".".join(file.relative_to(ROOT).with_suffix("").parts))
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{package}."):
                imported = part(node.module)
                assert imported == importer or level[imported] > level[importer], f"{file} imports {node.module}"


def test_vllm_is_imported_in_its_own_rooms_only() -> None:
    def imported(file: Path) -> set[str]:
        nodes = list(ast.walk(ast.parse(file.read_text())))
        names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
        return {name.partition(".")[0] for name in names}

    package = ROOT / "mergekit_bio"
    importers = {file.relative_to(package) for file in package.rglob("*.py") if "vllm" in imported(file)}
    # `doctor` looks at what is installed.
    assert {path.parts[:2] if path.parts[0] == "engine" else path.parts[:1] for path in importers} <= {
        ("engine", "vllm"),
        ("serve",),
        ("diagnosis.py",),
    }
    assert Path("engine/vllm/offline.py") in importers
