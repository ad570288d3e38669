"""Which stack of layers a tensor is in, and whether Transformers builds its layer at all."""

import re

from mergekit_bio.adapter.interface import Base
from mergekit_bio.adapter.names import plain_parts

#: Layers that predict further tokens: in the files of DeepSeek, Qwen3-Next, MiMo and others, but in no model of
#: Transformers.
_MORE_TOKENS = re.compile(r"mtp|mtp_\w+|nextn\w*")
_TOWER = re.compile(r"vision|visual|audio|image|video|speech|sound|tower|encoder")


def is_built(name: str, base: Base) -> bool:
    """Whether Transformers makes a parameter of the base's tensor ``name``; files hold layers that it leaves out."""
    parts = plain_parts(name)
    if any(_MORE_TOKENS.fullmatch(part) for part in parts):
        return False
    stack, layers = stack_of(name), base.layers
    if layers is None or any(_TOWER.search(part) for part in stack):
        return True
    layer = parts[len(stack)]
    return not layer.isdigit() or int(layer) < layers


def stack_of(module: str) -> tuple[str, ...]:
    """What a module is a part of, such as ``vision_tower.encoder.layers``; () for a part of the model itself."""
    parts = plain_parts(module)
    number = next((index for index, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    return parts[:number]
