"""Tells which modules of a base store their weight as [in, out], as Transformers' Conv1D does (GPT-2 and its kin).

A LoRA for such a module is folded transposed. Where the matrix is not square, its shape tells. Where it is, PEFT's
``fan_in_fan_out`` does not: there is one for all modules, and PEFT itself asks for the module's class. What tells is
the base: a Conv1D has a bias with one number for each output, and so shows on which side of its weight the outputs are.
"""

from collections.abc import Mapping

from mergekit_bio.checkpoint.header import TensorInfo

#: What Transformers makes Conv1D wherever it uses it. Attention's projections may all be square, and then only their
#: names tell.
_NAMES = frozenset({"c_attn", "q_attn", "c_proj", "c_fc"})


def conv1d_modules(tensors: Mapping[str, TensorInfo]) -> frozenset[str]:
    """Last parts of the names of modules that the base stores as [in, out]; none for most architectures."""
    stored: dict[bool, set[str]] = {False: set(), True: set()}
    for name, info in tensors.items():
        module, _, kind = name.rpartition(".")
        bias = tensors.get(f"{module}.bias")
        if kind == "weight" and bias and len(info.shape) == 2 and info.shape[0] != info.shape[1]:
            rows, columns = info.shape
            if bias.shape in ((rows,), (columns,)):
                stored[bias.shape == (columns,)].add(module.rpartition(".")[2])
    return frozenset((stored[True] | _NAMES) - stored[False]) if stored[True] else frozenset()
