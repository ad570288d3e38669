"""A full fine-tune: a second checkpoint of the same model -> dense deltas ``W1 - W0``."""

from mergekit_bio.adapter.delta import check_float
from mergekit_bio.adapter.dense import Dense
from mergekit_bio.adapter.interface import Adapter, Base, check_fits
from mergekit_bio.checkpoint.directory import Checkpoint
from mergekit_bio.checkpoint.header import FLOATS
from mergekit_bio.checkpoint.source import Source
from mergekit_bio.errors import AdapterError


def load(source: Source, base: Base) -> Adapter:
    """Read the checkpoint ``source`` as deltas for ``base``.

    Raises:
        AdapterError: It lacks tensors of the base, or holds others.
    """
    tuned = Checkpoint.open(source.path)
    where = base.checkpoint.root
    for name in base.checkpoint.tensors:
        if name not in tuned.tensors:
            raise AdapterError(f"{tuned.root}: has no tensor {name}, which the base {where} has; it is another model")
    deltas = {}
    for name, info in tuned.tensors.items():
        target = base.checkpoint.tensors.get(name)
        if target is not None and target.dtype not in FLOATS and info.shape == target.shape:
            continue  # buffers, such as position ids, are the base's
        check_float(info)
        check_fits(name, Dense(info), base)
        deltas[name] = (Dense(info),)
    return Adapter("finetune", source, tuned.root, deltas, config=tuned.config)
