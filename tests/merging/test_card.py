"""The model card, read back as the hub reads it: YAML metadata, then Markdown."""

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

import mergekit_bio
from mergekit_bio.merging.card import model_card

NATURELM: dict[str, Any] = {
    "format": "mergekit-bio/merge@2",
    "created": "2026-01-02T03:04:05+00:00",
    "version": "0.1.0",
    "command": "mergekit-bio merge --alpha 0.5",
    "base": {
        "source": "meta-llama/Llama-3.1-8B-Instruct",
        "id": "meta-llama/Llama-3.1-8B-Instruct",
        "revision": "0e9e39f249a16976918f6564b8830bc894c89659",
        "fingerprint": "ba5e" * 16,
        "license": "llama3.1",
        "license_files": ["LICENSE", "USE_POLICY.md"],
        "model_type": "llama",
        "name": "Llama-3.1-8B-Instruct",
    },
    "adapters": [
        {
            "kind": "naturelm-audio",
            "source": "EarthSpeciesProject/NatureLM-audio",
            "id": "EarthSpeciesProject/NatureLM-audio",
            "revision": "5b2f0d2e0f5d8d9e7e1d6f7a8b9c0d1e2f3a4b5c",
            "fingerprint": "ada9" * 16,
            "license": "cc-by-nc-sa-4.0",
            "license_files": [],
            "name": "NatureLM-audio",
            "peft_type": None,
            "alpha": {"default": 0.5, "modules": {}},
            "scaling": {"32/32": 128},
            "deltas": 128,
        }
    ],
    "alpha": "0.50",
    "dtype": "keep",
    "rounding": "stochastic",
    "seed": 7,
    "device": "cpu",
    "audio_prefix": True,
    "text_only": False,
    "untied": False,
    "shared": None,
    "versions": {"torch": "2.13.0", "python": "3.11.9"},
    "rounding_loss": [
        {
            "modules": "self_attn.q_proj",
            "tensors": 32,
            "elements": 536870912,
            "delta_over_weight": 0.00812,
            "loss": 0.41,
            "bias": 0.0021,
            "loss_nearest": 0.29,
            "bias_nearest": 0.18,
        },
        {
            "modules": "total",
            "tensors": 32,
            "elements": 536870912,
            "delta_over_weight": 0.00812,
            "loss": 0.41,
            "bias": 0.0021,
            "loss_nearest": 0.29,
            "bias_nearest": 0.18,
        },
    ],
    "files": {"model-00001-of-00004.safetensors": {"bytes": 4, "header_sha256": "ab" * 32}},
    "tensors": {"model.layers.0.self_attn.q_proj.weight": {"sha256": "cd" * 32}},
}


def manifest(**changes: Any) -> dict[str, Any]:
    """NatureLM-audio at half strength, with some of it changed: ``base__license=None`` reaches one level down."""
    changed = copy.deepcopy(NATURELM)
    for path, value in changes.items():
        *parents, key = path.split("__")
        target: Any = changed
        for parent in parents:
            target = target["adapters"][0] if parent == "adapter" else target[parent]
        target[key] = value
    return changed


def metadata(**changes: Any) -> dict[str, Any]:
    return ModelCard(model_card(manifest(**changes)), ignore_metadata_errors=False).data.to_dict()


def rows(card: str) -> list[list[str]]:
    """Every row of every table, as a Markdown renderer finds them."""
    found: list[list[str]] = []
    tokens = MarkdownIt("commonmark").enable("table").parse(ModelCard(card).text)
    for opening, token in pairwise(tokens):
        if opening.type == "tr_open":
            found.append([])
        if opening.type in ("th_open", "td_open"):
            found[-1].append(token.content)
    return found


def python_blocks(card: str) -> list[str]:
    return [token.content for token in MarkdownIt("commonmark").parse(ModelCard(card).text) if token.info == "python"]


def headings(card: str) -> list[tuple[str, str]]:
    tokens = MarkdownIt("commonmark").parse(ModelCard(card).text)
    return [(at.tag, text.content) for at, text in pairwise(tokens) if at.type == "heading_open"]


def test_metadata_names_the_parents_and_the_task() -> None:
    data = metadata()

    assert data["base_model"] == ["meta-llama/Llama-3.1-8B-Instruct", "EarthSpeciesProject/NatureLM-audio"]
    assert data["base_model_relation"] == "merge"
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "audio-text-to-text"
    assert {"merge", "mergekit-bio", "lora", "bioacoustics", "audio"} == set(data["tags"])


def test_text_only_is_text_generation_without_audio() -> None:
    data = metadata(audio_prefix=False)

    assert data["pipeline_tag"] == "text-generation"
    assert "audio" not in data["tags"]


def test_local_sources_are_no_base_models() -> None:
    data = metadata(base__id=None, base__revision=None)

    assert data["base_model"] == ["EarthSpeciesProject/NatureLM-audio"]


def test_no_source_from_the_hub_leaves_the_relation_out() -> None:
    data = metadata(base__id=None, base__revision=None, adapter__id=None, adapter__revision=None)

    assert "base_model" not in data
    assert "base_model_relation" not in data


@pytest.mark.parametrize(
    ("base", "adapter", "expected"),
    [
        ("llama3.1", "llama3.1", {"license": "llama3.1"}),
        ("apache-2.0", None, {"license": "apache-2.0"}),
        (None, None, {}),
        (
            "llama3.1",
            "cc-by-nc-sa-4.0",
            {
                "license": "other",
                "license_name": "llama3.1-and-cc-by-nc-sa-4.0",
                "license_link": "https://creativecommons.org/licenses/by-nc-sa/4.0/",
            },
        ),
    ],
)
def test_license_metadata_follows_the_sources(base: str | None, adapter: str | None, expected: dict[str, str]) -> None:
    data = metadata(base__license=base, adapter__license=adapter, base__name="weights")

    assert {key: value for key, value in data.items() if key.startswith("license")} == expected


def test_a_licence_without_identifier_is_linked_to_its_source() -> None:
    data = metadata(base__license="other", adapter__license=None)

    assert data["license"] == data["license_name"] == "other"
    assert data["license_link"] == "https://huggingface.co/meta-llama/Llama-3.1-8B-Instruct"


def test_a_copy_of_metas_llama_without_a_card_is_known_by_its_name() -> None:
    assert metadata(base__license=None, adapter__license=None)["license"] == "llama3.1"


def test_llama_derivative_is_built_with_llama_and_named_so() -> None:
    card = model_card(manifest())

    assert headings(card)[0] == ("h1", "Llama-3.1-8B-Instruct + 0.5 × NatureLM-audio")
    assert "**Built with Llama**" in card
    assert "Llama 3.1 Community License, Copyright © Meta Platforms, Inc." in card
    assert "The text is here: `LICENSE`, `USE_POLICY.md`." in card


@pytest.mark.parametrize(
    ("name", "license_id", "title"),
    [
        ("Meta-Llama-3.1-8B", "llama3.1", "Llama-3.1-8B + 0.5 × NatureLM-audio"),
        ("owl-chat", "llama3.2", "Llama 3.2 owl-chat + 0.5 × NatureLM-audio"),
        ("SmolLM2-135M", "apache-2.0", "SmolLM2-135M + 0.5 × NatureLM-audio"),
    ],
)
def test_title_begins_with_llama_where_the_licence_asks(name: str, license_id: str, title: str) -> None:
    card = model_card(manifest(base__name=name, base__license=license_id))

    assert headings(card)[0] == ("h1", title)
    assert ("**Built with Llama**" in card) == license_id.startswith("llama")


def test_llama_3_has_its_own_wording() -> None:
    card = model_card(manifest(base__license="llama3", base__name="Meta-Llama-3-8B"))

    assert "**Built with Meta Llama 3**" in card


def test_a_source_without_licence_is_said_to_have_none() -> None:
    card = model_card(manifest(adapter__license=None))

    assert (
        "[EarthSpeciesProject/NatureLM-audio](https://huggingface.co/EarthSpeciesProject/NatureLM-audio) states no"
        in card
    )


def test_provenance_table_has_everything_needed_to_make_it_again() -> None:
    card = model_card(manifest(adapter__alpha={"default": 0.5, "modules": {"q_proj": 0.3}}))
    table = dict(row for row in rows(card) if len(row) == 2)

    assert "0e9e39f249a1" in table["Base"]
    assert table["Base, fingerprint"] == f"`{'ba5e' * 16}`"
    assert "5b2f0d2e0f5d" in table["Adapter"]
    assert table["Adapter, fingerprint"] == f"`{'ada9' * 16}`"
    assert table["Deltas"] == "128 tensors (naturelm-audio, scaling 32/32)"
    assert table["α"] == "0.5, 0.3 on `q_proj`"
    assert table["Data type"] == "as in the base"
    assert table["Rounding"] == "stochastic, seed 7"
    assert table["Made"] == "2026-01-02T03:04:05+00:00 on cpu"
    assert table["With"] == "mergekit-bio 0.1.0, torch 2.13.0, python 3.11.9"
    assert "```sh\nmergekit-bio merge --alpha 0.5\n```" in card


def test_paths_on_the_machine_where_it_was_made_stay_there() -> None:
    card = model_card(manifest(base__id=None, base__revision=None, base__source="/home/owl/secret/Llama-3.1-8B"))

    assert "secret" not in card


def test_strengths_by_module_are_not_one_number_in_the_title() -> None:
    card = model_card(manifest(adapter__alpha={"default": 0.0, "modules": {"q_proj": 0.3}}))

    assert headings(card)[0][1] == "Llama-3.1-8B-Instruct + NatureLM-audio (α by module)"


def test_several_adapters_are_all_in_the_title_and_the_table() -> None:
    both = manifest()
    second = copy.deepcopy(both["adapters"][0]) | {
        "kind": "peft",
        "peft_type": "LORA",
        "name": "style",
        "id": None,
        "revision": None,
        "alpha": {"default": -0.25, "modules": {}},
        "scaling": {"16/8": 7},
    }
    both["adapters"].append(second)
    card = model_card(both)

    assert headings(card)[0][1] == "Llama-3.1-8B-Instruct + 0.5 × NatureLM-audio + -0.25 × style"
    assert [row[1] for row in rows(card) if row[0] == "Deltas"] == [
        "128 tensors (naturelm-audio, scaling 32/32)",
        "128 tensors (LORA, scaling 16/8)",
    ]


def test_rounding_table_compares_with_nearest() -> None:
    table = [row for row in rows(model_card(manifest())) if len(row) > 2]

    assert table == [
        [
            "Modules",
            "Tensors",
            "Weights",
            "‖ΔW‖ / ‖W‖",
            "loss, stochastic",
            "bias, stochastic",
            "loss, nearest",
            "bias, nearest",
        ],
        ["`self_attn.q_proj`", "32", "536,870,912", "0.00812", "0.41", "0.0021", "0.29", "0.18"],
        ["**total**", "32", "536,870,912", "0.00812", "0.41", "0.0021", "0.29", "0.18"],
    ]


def test_rounding_table_of_a_nearest_merge_shows_nearest_once() -> None:
    heads = next(row for row in rows(model_card(manifest(rounding="nearest"))) if len(row) > 2)

    assert heads[4:] == ["loss, nearest", "bias, nearest"]


def test_a_merge_that_rounded_nothing_has_no_rounding_section() -> None:
    assert "What rounding cost" not in [text for _, text in headings(model_card(manifest(rounding_loss=[])))]


def test_how_to_load_with_and_without_ears() -> None:
    hearing, plain = model_card(manifest()), model_card(manifest(audio_prefix=False))

    assert "import mergekit_bio" in hearing
    assert "AutoModelForMultimodalLM" in hearing
    assert "convert_hf_to_gguf.py" not in hearing
    assert "AutoModelForCausalLM" in plain
    assert "vllm serve" in plain
    assert "convert_hf_to_gguf.py" in plain


def test_sweep_says_which_files_are_shared() -> None:
    shared = {"files": ["model-00001-of-00003.safetensors"], "with": ["alpha-0.00", "alpha-1.00"]}
    card = model_card(manifest(shared=shared))

    assert "`model-00001-of-00003.safetensors`" in card
    assert "hard links shared with alpha-0.00, alpha-1.00" in card


def test_papers_cited_are_those_it_rests_on() -> None:
    naturelm, other = model_card(manifest()), model_card(manifest(adapter__kind="peft"))

    assert "2511.05171" in naturelm
    assert "2411.07186" in naturelm
    assert "2511.05171" in other
    assert "2411.07186" not in other


def test_a_name_cannot_break_the_table() -> None:
    odd = "a|b`c\nd"
    card = model_card(manifest(adapter__id=None, adapter__revision=None, adapter__name=odd))

    assert [row[1] for row in rows(card) if row[0] == "Adapter"] == ["`a|b'c d`"]
    assert headings(card)[0][1].endswith("a|b'c d")


@pytest.mark.parametrize("text_only", [True, False])
def test_python_in_the_card_loads_the_checkpoint(
    golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text_only: bool
) -> None:
    (merged,) = mergekit_bio.merge(
        base=golden / "llama-tiny",
        adapter=golden / "naturelm-tiny",
        alphas=[0.5],
        out=tmp_path / "merged",
        text_only=text_only,
        device="cpu",
    )
    monkeypatch.chdir(merged.path)
    names: dict[str, Any] = {}
    (block,) = python_blocks((merged.path / "README.md").read_text())
    exec(compile(block, "README.md", "exec"), names)

    assert "processor" in names or "tokenizer" in names
    assert hasattr(names["model"], "generate")
    assert type(names["model"]).__name__ == (
        "LlamaForCausalLM" if text_only else "NatureLMAudioForConditionalGeneration"
    )
