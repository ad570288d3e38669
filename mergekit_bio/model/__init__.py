"""The merged audio model for Transformers.

Importing this package makes Transformers' Auto classes load merged directories:

    import mergekit_bio.model
    from transformers import AutoModelForMultimodalLM, AutoProcessor

    model = AutoModelForMultimodalLM.from_pretrained("merged/half")

Raises:
    MissingPackageError: Transformers is not installed.
    EngineError: The Transformers that is installed does not work, or lacks what the model needs.
"""

from importlib.util import find_spec

from mergekit_bio.errors import EngineError, MissingPackageError

if find_spec("transformers") is None:
    raise MissingPackageError("transformers", "eval", "running a model")
try:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM, AutoProcessor

    from mergekit_bio.model.configuration import NatureLMAudioConfig
    from mergekit_bio.model.modeling import NatureLMAudioForConditionalGeneration
    from mergekit_bio.model.processing import NatureLMAudioProcessor
except ImportError as error:
    raise EngineError(
        f"Transformers is installed, but does not work ({error.__cause__ or error}); see mergekit-bio doctor"
    ) from error

AutoConfig.register(NatureLMAudioConfig.model_type, NatureLMAudioConfig, exist_ok=True)
AutoProcessor.register(NatureLMAudioConfig, NatureLMAudioProcessor, exist_ok=True)
for auto_model in (AutoModelForMultimodalLM, AutoModelForCausalLM):
    auto_model.register(NatureLMAudioConfig, NatureLMAudioForConditionalGeneration, exist_ok=True)
