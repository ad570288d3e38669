"""Finds a checkpoint's input embedding and output head, whatever its architecture calls them."""

import re
from dataclasses import dataclass

from mergekit_bio.adapter.names import plain_parts
from mergekit_bio.checkpoint.directory import Checkpoint

#: Last parts of the modules' names: Llama and most others, GPT-2, GPT-NeoX, Bloom and Falcon, InternLM2, Mamba.
_EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings", "embeddings")
#: Most architectures, GPT-NeoX, InternLM2, ChatGLM, Whisper.
_HEADS = ("lm_head", "embed_out", "output", "output_layer", "proj_out")
#: Modules that the embedding is a part of, and the head is not: ``language_model.model.embed_tokens`` has its head in
#: ``language_model.lm_head``.
_BODIES = ("model", "transformer", "decoder", "gpt_neox", "backbone")
#: The embedding of a model's body alone -> what its class is called in the whole model.
_BODY_PREFIXES = {
    "wte.weight": "transformer.",
    "word_embeddings.weight": "transformer.",
    "embed_tokens.weight": "model.",
    "decoder.embed_tokens.weight": "model.",
}
#: Classes of Transformers that end in the hidden states, or in a head that is no language model's.
_HEADLESS = re.compile(
    r"(?!.*(LMHead|DoubleHeads)Model).*Model|.*For(Sequence|Token|Audio|Image)Classification|.*For(QuestionAnswering|MultipleChoice|"
    r"MaskedLM|TextEncoding|Embedding|Reward\w*)|.*Encoder"
)


@dataclass(frozen=True)
class Embeddings:
    """Names of weights.

    Attributes:
        input: The input embedding's; None if there is none, or more than one.
        head: The output head's. It need not be stored: one that shares the embedding's matrix has the name that it
            would have in the files if it did not. None if the architecture has no head.
        missing_prefix: What Transformers 4 wants in front of all names but the head's, once there is one, where the
            files are those of a model's body alone (GPT-2's and Bloom's on the hub): ``"transformer."``.
    """

    input: str | None
    head: str | None
    missing_prefix: str = ""


def find_embeddings(checkpoint: Checkpoint) -> Embeddings:
    """Find both by the names of the tensors and the architecture that ``config.json`` states."""
    # 1. The embedding: a matrix of that name which is in no layer. Of several, the language model's own.
    matrices = {name: info.shape for name, info in checkpoint.tensors.items() if len(info.shape) == 2}
    candidates = [name for name in matrices if _is_called(name, _EMBEDDINGS)]
    if len(candidates) > 1:
        candidates = [name for name in candidates if len(plain_parts(name)) == 2]
    embedding = candidates[0] if len(candidates) == 1 else None
    # 2. A stored head has a row for each token.
    heads = [
        name
        for name, shape in matrices.items()
        if _is_called(name, _HEADS) and (embedding is None or shape[0] == matrices[embedding][0])
    ]
    if embedding is None:
        return Embeddings(None, heads[0] if len(heads) == 1 else None)
    beside = _head_beside(embedding, checkpoint)
    if beside in heads or len(heads) == 1:
        return Embeddings(embedding, beside if beside in heads else heads[0])
    # 3. One that is not stored is the embedding's matrix, if the architecture has a head at all.
    architectures = checkpoint.config.get("architectures")
    headless = isinstance(architectures, list) and any(_HEADLESS.fullmatch(str(name)) for name in architectures)
    prefix = _BODY_PREFIXES.get(embedding, "")
    return Embeddings(embedding, None if headless or heads else beside, prefix)


def _is_called(name: str, modules: tuple[str, ...]) -> bool:
    *parents, module, kind = ["", *name.split(".")]
    if kind != "weight" or module not in modules or any(part.isdigit() for part in parents):
        return False
    return parents[-1] != "embeddings"  # BERT's and its kin's, whose heads are of another kind


def _head_beside(embedding: str, checkpoint: Checkpoint) -> str:
    """The name that the head of this embedding has in files."""
    parents = embedding.split(".")[:-2]
    if embedding == "gpt_neox.embed_in.weight":
        return "embed_out.weight"
    while parents and parents[-1] in _BODIES:
        parents.pop()
    if parents[:1] == ["model"]:  # the whole model's body, ``model.language_model``: the head is beside that
        parents = []
    head = "proj_out" if checkpoint.config.get("model_type") == "whisper" else "lm_head"
    return ".".join([*parents, head, "weight"])
