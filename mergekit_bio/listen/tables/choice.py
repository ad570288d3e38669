"""Which format a user asks for, by the output's name and ``--format``."""

from importlib import import_module
from pathlib import Path

from mergekit_bio.errors import OutputError
from mergekit_bio.listen.tables.interface import Table
from mergekit_bio.outside_data import nearest

_HERE = "mergekit_bio.listen.tables"
#: Of ``--format``, and of a file's suffix without it: where the class is.
_BY_SUFFIX = {
    ".csv": f"{_HERE}.lines:CsvTable",
    ".jsonl": f"{_HERE}.lines:JsonLinesTable",
    ".txt": f"{_HERE}.lines:TextTable",
    ".parquet": f"{_HERE}.parquet:ParquetTable",
}
_FOLDER = {"raven": f"{_HERE}.raven:RavenTables", "audacity": f"{_HERE}.audacity:AudacityTable"}
FORMATS = tuple(_FOLDER)


def is_folder(out: Path) -> bool:
    """Whether an output is to be a folder: it is one, or its name has no suffix; ``2024.05`` has none."""
    return out.is_dir() or not out.suffix or out.suffix[1:].isdigit()


def table_class(out: Path, table_format: str | None) -> type[Table]:
    """The class that writes a table.

    Args:
        out: The file or folder.
        table_format: One of :data:`FORMATS`; None goes by the file's suffix.

    Raises:
        OutputError: There is no such format, or it is not written under such a name.
    """
    if table_format is None:
        if out.suffix not in _BY_SUFFIX or out.is_dir():
            known = ", ".join(_BY_SUFFIX)
            raise OutputError(f"{out}: the name must end in {known}; folders are for --format {' or '.join(FORMATS)}")
        where = _BY_SUFFIX[out.suffix]
    elif table_format not in _FOLDER:
        raise OutputError(f"--format {table_format}: no such format{nearest(table_format, FORMATS)}")
    elif is_folder(out):
        where = _FOLDER[table_format]
    elif table_format == "raven" and out.suffix == ".txt":
        where = f"{_HERE}.raven:RavenTable"
    else:
        or_file = ", or one .txt for all recordings" if table_format == "raven" else ""
        raise OutputError(f"{out}: --format {table_format} writes a file a recording: name a folder{or_file}")
    module, _, name = where.partition(":")
    table: type[Table] = getattr(import_module(module), name)
    return table


def journal_file(out: Path) -> Path:
    """Where the answers are kept that a table is made of: ``birds.csv`` -> ``birds.journal``; of a folder, inside."""
    return out / "answers.journal" if is_folder(out) else out.with_suffix(".journal")
