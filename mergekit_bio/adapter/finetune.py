"""A full fine-tune: a second checkpoint of the same model -> dense deltas ``W1 - W0``."""

import re

from mergekit_bio.adapter.delta import check_float
from mergekit_bio.adapter.dense import Dense
from mergekit_bio.adapter.interface import Adapter, Base, check_fits
from mergekit_bio.adapter.layers import is_built
from mergekit_bio.adapter.names import match_names
from mergekit_bio.checkpoint.directory import Checkpoint
from mergekit_bio.checkpoint.header import FLOATS, TensorInfo
from mergekit_bio.checkpoint.model_config import language_setting
from mergekit_bio.checkpoint.source import Source
from mergekit_bio.errors import AdapterError

# Constants that old files hold beside the weights: rotary frequencies, causal masks and what is put in their place.
_CONSTANTS = re.compile(r".*\.(rotary_emb\.inv_freq|masked_bias|(attn|attention)\.bias)")


def load(source: Source, tuned: Checkpoint, base: Base) -> Adapter:
    """Read the checkpoint ``tuned``, which is at ``source``, as deltas for ``base``.

    Raises:
        AdapterError: It lacks tensors of the base, or holds others.
    """
    # 1. Find the tensors of the base that its own are trained from. Constants are the base's.
    weights = {name: info for name, info in tuned.tensors.items() if not _is_constant(info)}
    names = match_names(weights, base)
    found = {theirs: weights[ours] for ours, theirs in names.items()}
    # 2. A tied head that the base holds all the same, and the fine-tune does not, is its embedding.
    own = Base(source, tuned)
    if base.head is not None and base.head not in found and own.tied and (base.shared or _says_tied(tuned)):
        found[base.head] = tuned.tensors[str(own.input_embedding)]
    # 3. All else that the base holds must be there, but for layers that training does not build.
    kept = [info for name, info in base.checkpoint.tensors.items() if name not in found and not _is_constant(info)]
    kept = [info for info in kept if info.dtype in FLOATS]
    lost = [info.name for info in kept if is_built(info.name, base)]
    if lost:
        raise AdapterError(
            f"{tuned.root}: has no tensor {lost[0]}, which the base {base.checkpoint.root} has; it is another model"
        )
    deltas = {}
    for name, info in found.items():
        target = base.find(name)
        if target is not None and target.dtype not in FLOATS and info.shape == target.shape:
            continue  # buffers, such as position ids, are the base's
        check_float(info)
        check_fits(name, Dense(info), base)
        deltas[name] = (Dense(info),)
    notes = [f"it has no {kept[0].name} (and {len(kept) - 1} more tensors); they stay the base's"] if kept else []
    return Adapter("finetune", source, tuned.root, deltas, config=tuned.config, notes=tuple(notes))


def _says_tied(checkpoint: Checkpoint) -> bool:
    return language_setting(checkpoint.config, "tie_word_embeddings") is True


def _is_constant(info: TensorInfo) -> bool:
    return bool(_CONSTANTS.fullmatch(info.name)) and (len(info.shape) != 1 or info.name.endswith("inv_freq"))
