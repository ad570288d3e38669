"""Makes Transformers' Auto classes know the merged model, whichever of the two packages is imported first."""

import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_CLASSES = {
    "configuration": "NatureLMAudioConfig",
    "modeling": "NatureLMAudioForConditionalGeneration",
    "processing": "NatureLMAudioProcessor",
}


def register() -> None:
    """Register the audio model with Transformers now if it is imported, else as soon as it will be.

    So ``import mergekit_bio`` neither needs Transformers nor waits for it. The modules of the classes call this too, at
    their end: one of them may be what imports Transformers first, and is only half there when Transformers is whole.
    """
    if "transformers" not in sys.modules:
        sys.meta_path.insert(0, _AfterTransformers())
    elif not _half_imported():
        _register()


def _half_imported() -> bool:
    modules = ((sys.modules.get(f"{__package__}.{name}"), class_) for name, class_ in _CLASSES.items())
    return any(module is not None and not hasattr(module, class_) for module, class_ in modules)


class _AfterTransformers(MetaPathFinder):
    """Registers right after the first ``import transformers``.

    Not later: while one of its submodules is being imported, another one that we need may be half there.
    """

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "transformers":
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            # Whoever only asks whether Transformers is installed does not import it.
            sys.meta_path.insert(0, self)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                sys.meta_path.remove(self)
                execute(module)
                register()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _register() -> None:
    try:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM, AutoProcessor

        from mergekit_bio.model.configuration import NatureLMAudioConfig
        from mergekit_bio.model.modeling import NatureLMAudioForConditionalGeneration
        from mergekit_bio.model.processing import NatureLMAudioProcessor
    except ImportError as error:
        # Merging needs no Transformers, so another version beside us must not break it, nor itself.
        warnings.warn(
            f"Transformers will not load merged audio models ({error.__cause__ or error}); see mergekit-bio doctor",
            stacklevel=2,
        )
        return
    AutoConfig.register(NatureLMAudioConfig.model_type, NatureLMAudioConfig, exist_ok=True)
    AutoProcessor.register(NatureLMAudioConfig, NatureLMAudioProcessor, exist_ok=True)
    for auto_model in (AutoModelForMultimodalLM, AutoModelForCausalLM):
        auto_model.register(NatureLMAudioConfig, NatureLMAudioForConditionalGeneration, exist_ok=True)
