"""Registers the commands and maps errors to one line and an exit code."""

import os
import signal
import sys
import warnings
from collections.abc import Callable
from typing import Annotated, NoReturn

import typer

import mergekit_bio
from mergekit_bio.cli import (
    ask,
    demo,
    doctor,
    embed,
    eval,
    inspect,
    merge,
    push,
    rebuild,
    recipes,
    report,
    serve,
    verify,
)
from mergekit_bio.cli.console import tell
from mergekit_bio.engine.vllm.log import leave_out_the_usual
from mergekit_bio.errors import MergekitBioError

leave_out_the_usual()  # here, because vLLM's processes import this module before they import vLLM

#: The exit code of what Ctrl-C or SIGTERM ended, as shells and typer have it.
INTERRUPTED = 130

app = typer.Typer(
    name="mergekit-bio",
    help="Fold LoRA deltas into Llama weights at any strength, and benchmark the result on bioacoustics.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,  # plain help: drawing it with rich costs a quarter of a second
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"mergekit-bio {mergekit_bio.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


#: In the order in which a user meets them, each with what the list of all says of it, whole in 80 columns.
COMMANDS: dict[str, tuple[Callable[..., None], str]] = {
    "demo": (demo.demo, "Try all of it on a small model: merge, ask, score, in a minute."),
    "doctor": (doctor.doctor, "Say what this machine lacks, and how to mend it."),
    "merge": (merge.merge, "Fold a LoRA or a fine-tune into a base, at any strength."),
    "inspect": (inspect.inspect, "Say what a model or an adapter is."),
    "verify": (verify.verify, "Check that a checkpoint is just what the merge wrote."),
    "push": (push.push, "Publish a checkpoint, or a sweep, on the Hugging Face Hub."),
    "rebuild": (rebuild.rebuild, "Make a merged checkpoint again from its receipt."),
    "ask": (ask.ask, "Ask a merged model about recordings, one or an archive."),
    "embed": (embed.embed, "Turn recordings into vectors."),
    "eval": (eval.evaluate, "Ask every checkpoint of a recipe, and score the answers."),
    "report": (report.report, "Score finished runs again; draw tables, figures, a page."),
    "serve": (serve.serve, "Serve OpenAI's API with audio, at any strength; a page, too."),
}
for name, (command, summary) in COMMANDS.items():
    rest_is_vllms = {"ignore_unknown_options": name == "serve"}  # the options that are not ours
    app.command(name, short_help=summary, context_settings=rest_is_vllms)(command)
app.add_typer(recipes.app, name="recipes")


def main() -> NoReturn:
    """Run the command line.

    Exit codes: 0 done, 1 an error of the user's (one line on stderr), 2 usage, 130 interrupted. A bug is a
    traceback. ``MERGEKIT_BIO_DEBUG=1`` shows the traceback of user errors too.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # torch, which can do without, as merging does
    try:
        code = app(standalone_mode=False)
    except typer.TyperException as error:  # wrong usage; what typer raises has its own way to print itself
        error.show()  # type: ignore[attr-defined]
        code = error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except (MergekitBioError, OSError, ModuleNotFoundError) as error:
        message = _users_message(error)
        if message is None or os.environ.get("MERGEKIT_BIO_DEBUG"):
            raise
        tell(f"error: {message}")
        code = 1
    if code == INTERRUPTED:  # by an exception, or by typer, which turns Ctrl-C into this code
        print("interrupted", file=sys.stderr)
    sys.exit(code)


def _interrupt(signum: int, frame: object) -> NoReturn:
    """SIGTERM ends like Ctrl-C: through the clean-up of whatever is running."""
    raise KeyboardInterrupt


def _users_message(error: Exception) -> str | None:
    """What to tell the user of an error that a user can cause; None for a bug."""
    if isinstance(error, MergekitBioError):
        return str(error)
    if isinstance(error, OSError):  # with both parts it is the system's word on a file, else some library's own error
        known = error.filename is not None and error.strerror is not None
        return f"{os.fsdecode(error.filename)}: {error.strerror}" if known else None
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        if _comes_with_eval(package):
            return f"this needs {package}; install it with: pip install 'mergekit-bio[eval]'"
    return None


def _comes_with_eval(module: str) -> bool:
    """Whether ``module`` is of a package that the extra ``eval`` brings."""
    from importlib.metadata import requires

    from packaging.requirements import Requirement

    package = {"sklearn": "scikit-learn"}.get(module, module)
    requirements = [item for item in map(Requirement, requires("mergekit-bio") or ()) if item.name == package]
    return any(item.marker is not None and item.marker.evaluate({"extra": "eval"}) for item in requirements)
