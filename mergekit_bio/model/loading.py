"""Loading a merged directory for use, strictly."""

from pathlib import Path

import transformers

from mergekit_bio.audio.device import pick_device
from mergekit_bio.audio.layout import MODEL_TYPE
from mergekit_bio.checkpoint.directory import Checkpoint
from mergekit_bio.checkpoint.source import resolve
from mergekit_bio.errors import CheckpointError
from mergekit_bio.model.modeling import NatureLMAudioForConditionalGeneration
from mergekit_bio.model.processing import NatureLMAudioProcessor


def load_model(
    source: str | Path, *, device: str = "auto"
) -> tuple[NatureLMAudioForConditionalGeneration, NatureLMAudioProcessor]:
    """Load model and processor of a merged directory; see :func:`load_weights`."""
    path = resolve(source).path
    return load_weights(path, device=device), NatureLMAudioProcessor.from_pretrained(path)


def load_weights(path: Path, *, device: str = "auto", dtype: str = "auto") -> NatureLMAudioForConditionalGeneration:
    """Load the model of a merged directory.

    Args:
        path: The directory.
        device: ``"auto"`` (a GPU if there is one), or a torch device.
        dtype: Of Llama; ``"auto"`` is that of its files.

    Returns:
        The model, in eval mode.

    Raises:
        MergekitBioError: It has no audio tower, or its tensors are not exactly the model's.
    """
    if Checkpoint.open(path).config.get("model_type") != MODEL_TYPE:
        raise CheckpointError(
            f"{path}: is not a merged model with an audio tower (model_type {MODEL_TYPE}); make one with "
            "mergekit-bio merge, without --text-only"
        )
    device = pick_device(device)
    transformers.utils.logging.disable_progress_bar()
    model, info = NatureLMAudioForConditionalGeneration.from_pretrained(
        path, output_loading_info=True, ignore_mismatched_sizes=True, dtype=dtype
    )
    for problem, names in info.items():
        if names:
            raise CheckpointError(f"{path}: {problem.replace('_', ' ')}: {sorted(map(str, names))[0]}")
    loaded: NatureLMAudioForConditionalGeneration = model.eval().to(device)
    return loaded
