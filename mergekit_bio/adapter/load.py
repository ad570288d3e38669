"""Tells the kinds of adapter apart and reads one as deltas."""

from mergekit_bio.adapter import finetune, naturelm, peft
from mergekit_bio.adapter.interface import Adapter, Base
from mergekit_bio.adapter.peft_file import CONFIG
from mergekit_bio.audio.names import MERGED_PREFIX
from mergekit_bio.audio.tower import refuse_newer_layout
from mergekit_bio.checkpoint.directory import INDEX, SINGLE, Checkpoint, what_else
from mergekit_bio.checkpoint.manifest import MANIFEST
from mergekit_bio.checkpoint.source import Source
from mergekit_bio.errors import AdapterError


def load_adapter(source: Source, base: Base) -> Adapter:
    """Read ``source`` as deltas for ``base``: a PEFT directory, a NatureLM-audio checkpoint, or a full fine-tune.

    Headers and configuration are read, and of the weights what has to be compared: what a NatureLM-audio checkpoint
    repeats of the base, embeddings that may be one, and the ends of a LoRA that may be untrained.

    Raises:
        AdapterError: It is none of these, is damaged, or does not fit the base.
        CheckpointError: Its files are damaged.
    """
    if base.checkpoint.config.get("quantization_config"):
        raise AdapterError(
            f"{base.checkpoint.root / 'config.json'}: quantization_config: a quantized base cannot be folded exactly; "
            "give the full-precision model"
        )
    _refuse_merged_audio(base.source, base.checkpoint)
    refuse_newer_layout(source)
    if (source.path / CONFIG).exists():
        return peft.load(source, base)
    if not (source.path / SINGLE).exists() and not (source.path / INDEX).exists():
        raise AdapterError(
            f"{source.given}: holds neither {CONFIG} (PEFT), {SINGLE} nor {INDEX}; it is no adapter or checkpoint"
            f"{what_else(source.path)}"
        )
    checkpoint = Checkpoint.open(source.path)
    if naturelm.recognise(checkpoint):
        return naturelm.load(source, checkpoint, base)
    _refuse_merged_audio(source, checkpoint)
    return finetune.load(source, checkpoint, base)


def _refuse_merged_audio(source: Source, checkpoint: Checkpoint) -> None:
    if any(name.startswith(MERGED_PREFIX) for name in checkpoint.tensors):
        raise AdapterError(
            f"{source.given}: is a merge with an audio tower; give the base and the adapters it was made from (its "
            f"{MANIFEST} names them), all at once: one merge rounds once"
        )
