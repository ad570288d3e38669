"""The options of commands that ask an engine."""

from typing import Annotated, Any

import typer

from mergekit_bio.engine.choice import ENGINES

ServerOption = Annotated[
    list[str] | None,
    typer.Option(metavar="URL", help="A running `mergekit-bio serve` that answers. Repeatable."),
]
ApiKeyOption = Annotated[str | None, typer.Option(envvar="VLLM_API_KEY", help="The servers' key.")]
ApiOption = Annotated[
    str | None,
    typer.Option(
        help="What the servers speak: mergekit-bio, or openai, for any model that takes audio as input_audio (the key: "
        "--api-key or OPENAI_API_KEY). [default: mergekit-bio]",
    ),
]
ModelNameOption = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="The model that the servers are asked for, instead of the recipe's checkpoints."),
]
EngineOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY=VALUE",
        help="For the engine: dtype=float32, device=cpu, or any other argument that it takes, such as "
        "tensor_parallel_size=2 or distributed_executor_backend=ray. Repeatable.",
    ),
]
WorkersOption = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Engines that answer side by side, on Ray. [default: one for every GPU, if Ray is installed, else 1]",
    ),
]
RayOption = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="A running Ray cluster for the workers, or auto. [default: Ray on this machine only]",
    ),
]
ENGINE_NAMES = ", ".join(ENGINES)


def key_value(text: str) -> tuple[str, Any]:
    """``"enforce_eager=true"`` -> ``("enforce_eager", True)``: values are YAML's."""
    from mergekit_bio.errors import EngineError
    from mergekit_bio.outside_data import parse_yaml

    key, equals, value = text.partition("=")
    if not equals or not key:
        raise EngineError(f"--engine-option {text}: write KEY=VALUE, such as dtype=float32")
    try:
        return key, parse_yaml(value, source=f"--engine-option {key}", error=EngineError).data
    except EngineError:
        return key, value
