"""The options that several commands share, defined once."""

from typing import Annotated

import typer

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout instead of tables.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print only the essential result, one item a line.")]
