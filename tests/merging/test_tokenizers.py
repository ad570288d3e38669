"""Whose tokenizer a merge takes. The tokenizers are saved by Transformers and SentencePiece, and read back by them."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from merging.example import write_example
from merging.tiny import VOCABULARY, Case, train

import mergekit_bio
from mergekit_bio.errors import AdapterError, CheckpointError
from mergekit_bio.merging.merge import plan_merge
from mergekit_bio.merging.request import MergeRequest
from mergekit_bio.merging.tokenizers import _Tokenizer

tokenizers = pytest.importorskip("tokenizers", reason="the eval extra is not installed")
TEXT = ["the owl hoots at night", "the wren sings all day", "a whale sings for hours", "the frog calls at night"]


def fast(kind: str = "BPE"):
    """A tokenizer of one of the kinds of vocabulary that there are, for Transformers."""
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "</s>", "[UNK]"]
    model, trainer = {
        "BPE": (tokenizers.models.BPE(unk_token="[UNK]"), tokenizers.trainers.BpeTrainer),
        "WordPiece": (tokenizers.models.WordPiece(unk_token="[UNK]"), tokenizers.trainers.WordPieceTrainer),
        "WordLevel": (tokenizers.models.WordLevel(unk_token="[UNK]"), tokenizers.trainers.WordLevelTrainer),
        "Unigram": (tokenizers.models.Unigram(), tokenizers.trainers.UnigramTrainer),
    }[kind]
    unknown = {"unk_token": "[UNK]"} if kind == "Unigram" else {}
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(TEXT, trainer(vocab_size=60, special_tokens=special, show_progress=False, **unknown))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "[UNK]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template="{{ messages }}", **names)


def slow(folder: Path, added: dict[str, int]) -> None:
    """What Transformers 4 wrote of a Llama tokenizer without the fast one: a SentencePiece model, JSON beside it."""
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_writer=model, vocab_size=26, minloglevel=2
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    if added:
        (folder / "added_tokens.json").write_text(json.dumps(added))
    decoder = {str(number): {"content": token, "special": True} for token, number in added.items()}
    settings = {"added_tokens_decoder": decoder, "tokenizer_class": "LlamaTokenizer", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with 2048 rows and far fewer tokens, as Qwen's has more rows than tokens, and an adapter."""
    folder = tmp_path_factory.mktemp("sources")
    base, _ = write_example(folder)
    fast().save_pretrained(base)
    return folder


@pytest.fixture
def adapter(sources: Path, tmp_path: Path) -> Callable[..., Path]:
    """Makes an adapter with a tokenizer that ``change`` was done to."""

    def make(change: Callable = lambda tokenizer: None, name: str = "owls") -> Path:
        tokenizer = fast()
        change(tokenizer)
        folder = Path(shutil.copytree(sources / "adapter", tmp_path / name))
        tokenizer.save_pretrained(folder)
        return folder

    return make


def merge(sources: Path, adapters, out: Path, **options) -> tuple[Path, str]:
    """The merge, and what the user is told of its tokenizer."""
    request = {"base": sources / "base", "adapter": adapters, "alphas": [0.5], **options}
    notes = plan_merge(MergeRequest(**request)).tokenizer.notes
    (merged,) = mergekit_bio.merge(**request, out=out, fsync=False, device="cpu")
    return merged.path, " | ".join(notes)


def read(folder: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def add_owl(tokenizer) -> None:
    tokenizer.add_tokens(["<|owl|>"], special_tokens=True)


def speak_otherwise(tokenizer) -> None:
    tokenizer.chat_template = "{{ bos_token }}{{ messages }}"
    tokenizer.eos_token = tokenizer.pad_token = "<s>"


def test_an_adapters_tokenizer_is_taken_where_it_brings_tokens_in_spare_rows(sources, adapter, tmp_path):
    owls = adapter(add_owl)
    merged, notes = merge(sources, owls, tmp_path / "out")
    assert read(merged).get_vocab() == read(owls).get_vocab() != read(sources / "base").get_vocab()
    assert "differs from the base's in 1 new token ('<|owl|>'); it is taken (--tokenizer base" in notes


def test_a_tokenizer_without_new_tokens_stays_the_bases(sources, adapter, tmp_path):
    owls = adapter()
    file = owls / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text())))  # the same on one line, as other versions write it
    merged, notes = merge(sources, owls, tmp_path / "out")
    assert (merged / "tokenizer.json").read_bytes() == (sources / "base/tokenizer.json").read_bytes()
    assert notes == ""


def test_a_chat_template_of_its_own_and_other_ends_are_told_and_taken_when_asked_for(sources, adapter, tmp_path):
    owls = adapter(speak_otherwise)
    merged, notes = merge(sources, owls, tmp_path / "out")
    assert read(merged).chat_template == read(sources / "base").chat_template
    assert "in chat_template, eos_token, pad_token; the base's is taken (--tokenizer adapter for the other)" in notes
    merged, _ = merge(sources, owls, tmp_path / "theirs", tokenizer="adapter")
    theirs = read(merged)
    assert (theirs.chat_template, theirs.eos_token, theirs.pad_token) == (
        "{{ bos_token }}{{ messages }}", "<s>", "<s>"
    )  # fmt: skip


def test_the_bases_is_taken_when_asked_for(sources, adapter, tmp_path):
    merged, _ = merge(sources, adapter(add_owl), tmp_path / "out", tokenizer="base")
    assert read(merged).get_vocab() == read(sources / "base").get_vocab()


def test_a_token_without_a_row_is_told_and_the_bases_tokenizer_taken(sources, adapter, tmp_path):
    def add_many(tokenizer) -> None:
        tokenizer.add_tokens([f"<|{number}|>" for number in range(2048)])

    merged, notes = merge(sources, adapter(add_many), tmp_path / "out")
    assert read(merged).get_vocab() == read(sources / "base").get_vocab()
    assert "but the embeddings have 2048 rows; the base's is taken" in notes


def test_two_adapters_with_tokens_of_their_own_are_not_mixed(sources, adapter, tmp_path):
    owls = adapter(add_owl)
    wrens = adapter(lambda tokenizer: tokenizer.add_tokens(["<|wren|>"]), "wrens")
    with pytest.raises(AdapterError, match="owls and wrens: each brings a tokenizer of its own"):
        merge(sources, [owls, wrens], tmp_path / "out")
    both = adapter(lambda tokenizer: tokenizer.add_tokens(["<|owl|>", "<|wren|>"]), "both")
    merged, _ = merge(sources, [owls, both], tmp_path / "out")  # one has all that the other has
    assert read(merged).get_vocab() == read(both).get_vocab()


@pytest.mark.parametrize(
    ("file", "document", "what"),
    [
        ("tokenizer.json", {"model": {"vocab": [1, 2]}}, "vocabulary is"),
        ("tokenizer.json", {"model": {"vocab": [[]]}}, "vocabulary is"),
        ("tokenizer.json", {"model": {"vocab": "owl"}}, "vocabulary is"),
        ("tokenizer.json", {"model": {"vocab": {"owl": "first"}}}, "vocabulary is"),
        ("tokenizer.json", {"model": {"vocab": {"owl": None}}}, "vocabulary is"),
        ("vocab.json", {"owl": [0]}, "vocabulary is"),
        ("added_tokens.json", {"owl": "last"}, "added tokens are"),
        ("tokenizer.json", {"model": {"vocab": {"owl": 0}}, "added_tokens": ["<|owl|>"]}, "added tokens are"),
        ("tokenizer_config.json", {"added_tokens_decoder": ["<|owl|>"]}, "added tokens are"),
    ],
    ids=str,
)
def test_a_damaged_tokenizer_is_one_line(sources, tmp_path, file, document, what):
    owls = Path(shutil.copytree(sources / "adapter", tmp_path / "owls"))
    (owls / "vocab.json").write_text('{"owl": 0}')
    (owls / file).write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=f"owls: its {what} not listed as a tokenizer's are; save it again"):
        merge(sources, owls, tmp_path / "out")


def test_an_adapter_without_a_tokenizer_cannot_give_one(sources, tmp_path):
    with pytest.raises(AdapterError, match="holds no tokenizer"):
        merge(sources, sources / "adapter", tmp_path / "out", tokenizer="adapter")


def test_a_grown_vocabulary_brings_its_slow_tokenizer_along(base_of, tmp_path):
    base = Path(shutil.copytree(base_of("llama"), tmp_path / "base"))
    slow(base, {})
    case = Case.of("grown", added_tokens=2, modules_to_save=["embed_tokens", "lm_head"])
    train(case, base, tmp_path / "grown")
    slow(tmp_path / "grown", {"<|owl|>": VOCABULARY, "<|wren|>": VOCABULARY + 1})
    merged, notes = merge(tmp_path, tmp_path / "grown", tmp_path / "out")
    for name in ("tokenizer.model", "added_tokens.json", "tokenizer_config.json"):
        assert (merged / name).read_bytes() == (tmp_path / "grown" / name).read_bytes()
    assert json.loads((merged / "config.json").read_text())["vocab_size"] == VOCABULARY + 2
    assert "2 new tokens ('<|owl|>', '<|wren|>'); it is taken" in notes


@pytest.mark.parametrize("kind", ["BPE", "WordPiece", "WordLevel", "Unigram"])
def test_tokens_are_read_as_the_tokenizers_library_reads_them(kind, tmp_path):
    tokenizer = fast(kind)
    add_owl(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert _Tokenizer(tmp_path).tokens == theirs.get_vocab(with_added_tokens=True)


def test_pieces_are_read_as_sentencepiece_reads_them(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    slow(tmp_path, {"<|owl|>": 60})
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    pieces = {theirs.id_to_piece(number): number for number in range(theirs.get_piece_size())}
    assert _Tokenizer(tmp_path).tokens == pieces | {"<|owl|>": 60}
