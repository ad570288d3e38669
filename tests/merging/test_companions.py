"""What travels beside the weights: custom code, templates, licences, whatever they are called."""

import json
import shutil
from pathlib import Path

import pytest
from hub.server import File
from merging.example import write_example

import mergekit_bio
from mergekit_bio.checkpoint.source import licence_files, resolve
from mergekit_bio.errors import CheckpointError
from mergekit_bio.merging.verify import verify

MODELING = """
from transformers import LlamaForCausalLM
from .configuration_owl import OwlConfig


class OwlForCausalLM(LlamaForCausalLM):
    config_class = OwlConfig
"""
CONFIGURATION = """
from transformers import LlamaConfig


class OwlConfig(LlamaConfig):
    model_type = "owl"
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_example(tmp_path_factory.mktemp("example"))


@pytest.fixture
def base(sources: tuple[Path, Path], tmp_path: Path) -> Path:
    """A base of its own for one test."""
    return Path(shutil.copytree(sources[0], tmp_path / "base"))


def merge(base: Path, adapter: Path, out: Path, **options) -> Path:
    (merged,) = mergekit_bio.merge(base=base, adapter=adapter, alphas=[0.5], out=out, fsync=False, **options)
    return merged.path


def custom(base: Path, **auto_map: str) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_type": "owl", "auto_map": auto_map}))
    (base / "modeling_owl.py").write_text(MODELING)
    (base / "configuration_owl.py").write_text(CONFIGURATION)


def test_custom_code_travels_and_transformers_loads_with_it(base, sources, tmp_path):
    transformers = pytest.importorskip("transformers", reason="the eval extra is not installed")
    custom(base, AutoConfig="configuration_owl.OwlConfig", AutoModelForCausalLM="modeling_owl.OwlForCausalLM")
    merged = merge(base, sources[1], tmp_path / "merged")
    shutil.rmtree(base)
    model = transformers.AutoModelForCausalLM.from_pretrained(merged, trust_remote_code=True)
    assert type(model).__name__ == "OwlForCausalLM"
    verify(merged)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "preprocessor_config.json"])
def test_custom_code_that_is_not_there_is_named(base, sources, tmp_path, file):
    document = json.loads((base / file).read_text()) if (base / file).exists() else {}
    names = ["tokenization_owl.OwlTokenizer", None] if file == "tokenizer_config.json" else "modeling_owls.Owls"
    (base / file).write_text(json.dumps(document | {"auto_map": {"AutoThing": names}}))
    with pytest.raises(CheckpointError, match=rf"{file}: auto_map names .*, but .*_owls?\.py is not there"):
        merge(base, sources[1], tmp_path / "merged")


def speaks_owl(sources: tuple[Path, Path], base: Path, folder: Path) -> Path:
    """An adapter with new tokens, and a tokenizer of custom code."""
    adapter = Path(shutil.copytree(sources[1], folder))
    for source, vocabulary in ((base, {"owl": 0}), (adapter, {"owl": 0, "wren": 1})):
        (source / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    auto_map = {"AutoTokenizer": ["tokenization_owl.OwlTokenizer", None]}
    (adapter / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto_map}))
    (adapter / "tokenization_owl.py").write_text("from .hoots import hoot\n")
    (adapter / "hoots.py").write_text("def hoot():\n    from .calls import call\n")
    for name in ("calls.py", "train.py", "modeling_owl.py"):
        (adapter / name).write_text("THE_ADAPTERS = True\n")
    return adapter


def test_of_an_adapters_code_what_its_tokenizer_needs_travels_and_the_bases_stays_its_own(base, sources, tmp_path):
    custom(base, AutoConfig="configuration_owl.OwlConfig", AutoModelForCausalLM="modeling_owl.OwlForCausalLM")
    merged = merge(base, speaks_owl(sources, base, tmp_path / "owls"), tmp_path / "merged")
    code = sorted(file.name for file in merged.glob("*.py"))
    assert code == ["calls.py", "configuration_owl.py", "hoots.py", "modeling_owl.py", "tokenization_owl.py"]
    assert (merged / "modeling_owl.py").read_text() == MODELING


def test_code_of_one_name_and_two_contents_is_refused(base, sources, tmp_path):
    custom(base, AutoConfig="configuration_owl.OwlConfig")
    adapter = speaks_owl(sources, base, tmp_path / "owls")
    (base / "hoots.py").write_text("def hoot(): ...\n")
    with pytest.raises(CheckpointError, match=r"owls/hoots\.py: the tokenizer needs it, and .*base/hoots\.py is ano"):
        merge(base, adapter, tmp_path / "merged")
    taken = merge(base, adapter, tmp_path / "merged", tokenizer="base")
    assert (taken / "hoots.py").read_text() == "def hoot(): ...\n"


def test_code_of_another_repository_and_code_that_nothing_names_stay_there(base, sources, tmp_path):
    custom(base, AutoConfig="owl/owl--configuration_owl.OwlConfig")
    assert not list(merge(base, sources[1], tmp_path / "merged").glob("*.py"))


def test_further_chat_templates_and_other_tokenizer_files_travel(base, sources, tmp_path):
    names = [
        "additional_chat_templates/rag.jinja", "chat_template.jinja", "preprocessor_config.json",
        "video_preprocessor_config.json", "source.spm", "vocab-src.json", "entity_vocab.json", "bpe.codes",
        "normalizer.json", "SYSTEM_PROMPT.txt", "tokenizer.model.v3",
    ]  # fmt: skip
    for name in names:
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text("{}")
    merged = merge(base, sources[1], tmp_path / "merged")
    assert [name for name in names if not (merged / name).is_file()] == []
    verify(merged)
    merge(base, sources[1], merged, overwrite=True)  # all of it is ours
    (merged / "additional_chat_templates/mine.jinja").touch()
    with pytest.raises(mergekit_bio.MergekitBioError, match=r"mine\.jinja: no merge has written it"):
        merge(base, sources[1], merged, overwrite=True)


@pytest.mark.parametrize("name", ["license", "License.txt", "LICENCE", "license.md", "notice.txt"])
def test_licences_travel_in_small_letters_too(base, sources, tmp_path, name, hub):
    (base / name).write_text("the terms")
    assert (merge(base, sources[1], tmp_path / "merged") / name).read_text() == "the terms"
    repo = hub.create("owl/base")
    repo.commit({name: File.regular(b"the terms"), "config.json": File.regular(b"{}")})
    assert licence_files(resolve("owl/base")) == [name]


def test_the_hub_gives_what_travels(hub):
    names = [
        "modeling_owl.py", "additional_chat_templates/rag.jinja", "source.spm", "bpe.codes", "config.json",
        "tokenizer.model.v3", "prophetnet.tokenizer",
    ]  # fmt: skip
    hub.create("owl/base").commit({name: File.regular(b"{}") for name in names})
    folder = resolve("owl/base").path
    assert [name for name in names if not (folder / name).is_file()] == []


@pytest.mark.parametrize("letter", ["o", "ü", "日"])
def test_names_as_long_as_the_system_takes(sources, tmp_path, letter):
    longest = letter * (255 // len(letter.encode()))
    adapter = Path(shutil.copytree(sources[1], tmp_path / longest))
    (adapter / "LICENSE").write_text("the terms")
    merged = merge(sources[0], adapter, tmp_path / "out" / longest)
    assert merged.name == longest
    (licence,) = merged.glob("*-LICENSE")
    assert licence.read_text() == "the terms"
    assert list((tmp_path / "out").iterdir()) == [merged]


def test_a_strength_of_many_words_is_a_name_that_fits(sources, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    modules = ",".join(f"layers.{layer}.self_attn.{name}_proj=0.25" for layer in range(4) for name in "qkvo")
    (merged,) = mergekit_bio.merge(base=sources[0], adapter=sources[1], alphas=[modules], fsync=False)
    sweep = mergekit_bio.merge(base=sources[0], adapter=sources[1], alphas=[modules, 1], out="sweep", fsync=False)
    for checkpoint in (merged, *sweep):
        assert len(checkpoint.path.name.encode()) <= 255
        verify(checkpoint.path)
