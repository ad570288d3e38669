"""Which engines there are, and which one answers."""

from collections.abc import Mapping, Sequence
from importlib import import_module
from types import MappingProxyType

from mergekit_bio.engine.interface import Engine
from mergekit_bio.errors import EngineError
from mergekit_bio.outside_data import nearest

#: Name -> where its class is, imported when it is asked for. Where nobody names one, the first that is installed and
#: runs checkpoints itself answers; with servers given, the first that asks servers.
ENGINES: Mapping[str, str] = MappingProxyType(
    {
        "vllm": "mergekit_bio.engine.vllm.offline:VllmEngine",
        "transformers": "mergekit_bio.engine.transformers:TransformersEngine",
        "http": "mergekit_bio.engine.http:HttpEngine",
        "openai": "mergekit_bio.engine.openai_api:OpenAiEngine",
    }
)


#: What servers speak -> the engine that asks them: ``--api`` names it beside ``--engine http``.
APIS: Mapping[str, str] = MappingProxyType({"mergekit-bio": "http", "openai": "openai"})


def engine_of_api(engine: str | None, api: str | None) -> str | None:
    """The engine that a user means, who may name the API that the servers speak.

    Raises:
        EngineError: There is no such API, or the engine asks no servers.
    """
    if api is None:
        return engine
    if api not in APIS:
        raise EngineError(f"--api {api}: no such API{nearest(api, tuple(APIS))}")
    if engine not in (None, "http", APIS[api]):
        raise EngineError(f"--api {api}: goes with --engine http, not {engine}")
    return APIS[api]


def engine_class(name: str) -> type[Engine]:
    """The class of the engine of that name.

    Raises:
        EngineError: There is no such engine.
    """
    if name not in ENGINES:
        raise EngineError(f"--engine {name}: no such engine{nearest(name, tuple(ENGINES))}")
    module, _, class_name = ENGINES[name].partition(":")
    engine: type[Engine] = getattr(import_module(module), class_name)
    return engine


def choose_engine(name: str | None, *, servers: Sequence[str] = ()) -> tuple[type[Engine], str | None]:
    """The engine to use, once it is found to be installed, and what a user must be told about it.

    Args:
        name: What the user asks for; None leaves it to the order of :data:`ENGINES`.
        servers: Addresses for an engine that asks servers.

    Raises:
        EngineError: There is no such engine, or servers and engine do not fit.
        MissingPackageError: A package that it needs is not installed.
    """
    note = None
    if name is not None:
        engine = engine_class(name)
    else:
        candidates = [engine for engine in map(engine_class, ENGINES) if engine.remote == bool(servers)]
        engine = next((engine for engine in candidates if engine.missing() is None), candidates[-1])
        if engine is not candidates[0]:
            note = candidates[0].advice
    if engine.remote != bool(servers):
        wrong = "needs --server http://HOST:PORT" if engine.remote else "takes no --server"
        raise EngineError(f"--engine {engine.name} {wrong}")
    if error := engine.missing():
        raise error
    return engine, note
