"""Newer models of NatureLM-audio's makers, which are told apart by their files and refused by name."""

from mergekit_bio.checkpoint.source import Source
from mergekit_bio.errors import SourceError


def refuse_newer_layout(source: Source) -> None:
    """Refuse a directory that is laid out as NatureLM-audio 1.1 and later are.

    Raises:
        SourceError: It holds ``model.json`` beside ``model/llm``.
    """
    if (source.path / "model.json").is_file() and (source.path / "model" / "llm").is_dir():
        raise SourceError(
            f"{source.given}: is a NatureLM-audio of version 1.1 or later (model.json, model/llm), another "
            "architecture; this version reads NatureLM-audio 1.0, EarthSpeciesProject/NatureLM-audio"
        )
