"""Registers the commands and maps errors to one line and an exit code."""

import gc
import os
import signal
import sys
import warnings
from typing import Annotated, NoReturn

import typer

import mergekit_bio
from mergekit_bio.cli import ask, demo, doctor, embed, eval, inspect, merge, push, recipes, report, serve, verify
from mergekit_bio.engine.vllm.log import leave_out_the_usual

leave_out_the_usual()  # here, because vLLM's processes import this module before they import vLLM

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


COMMANDS = (
    merge.merge, inspect.inspect, verify.verify, push.push, ask.ask, embed.embed, report.report, demo.demo,
    doctor.doctor,
)  # fmt: skip
for command in COMMANDS:
    app.command()(command)
app.command("eval")(eval.evaluate)
app.add_typer(recipes.app, name="recipes")
app.command(context_settings={"ignore_unknown_options": True})(serve.serve)  # the rest are vLLM's flags


def _terminate(signum: int, frame: object) -> NoReturn:
    """SIGTERM ends like Ctrl-C: through the clean-up of whatever is running."""
    raise KeyboardInterrupt


def main() -> NoReturn:
    """Run the command line.

    Exit codes: 0 done, 1 an error of the user's (one line on stderr), 2 usage, 130 interrupted. A bug is a
    traceback. ``MERGEKIT_BIO_DEBUG=1`` shows the traceback of user errors too.
    """
    from mergekit_bio.errors import MergekitBioError

    signal.signal(signal.SIGTERM, _terminate)
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # torch, which can do without, as merging does
    gc.set_threshold(100_000)  # importing torch makes a million objects that stay: looking through them costs 0.2 s
    try:
        code = app(standalone_mode=False)
    except MergekitBioError as error:
        if os.environ.get("MERGEKIT_BIO_DEBUG"):
            raise
        print(f"error: {error}", file=sys.stderr)
        code = 1
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except BrokenPipeError:
        # The reader of our stdout has left (`mergekit-bio inspect ... | head`): nothing more to say.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except OSError as error:
        own = error.filename is None or error.strerror is None  # a library's, not the system's word on a file
        if own or os.environ.get("MERGEKIT_BIO_DEBUG"):
            raise
        print(f"error: {os.fsdecode(error.filename)}: {error.strerror}", file=sys.stderr)
        code = 1
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if not _comes_with_eval(package):
            raise
        print(f"error: this needs {package}; install it with: pip install 'mergekit-bio[eval]'", file=sys.stderr)
        code = 1
    except Exception as error:
        show = getattr(error, "show", None)  # click's UsageError and its kin print themselves
        if show is None:
            raise
        show()
        code = getattr(error, "exit_code", 2)
    if code == 130:  # by way of an exception, or of typer, which turns Ctrl-C into this code
        print("interrupted", file=sys.stderr)
    sys.exit(code)


def _comes_with_eval(module: str) -> bool:
    """Whether ``module`` is of a package that the extra ``eval`` brings."""
    from importlib.metadata import requires

    from packaging.requirements import Requirement

    package = {"sklearn": "scikit-learn"}.get(module, module)
    ours = [needed for needed in map(Requirement, requires("mergekit-bio") or ()) if needed.name == package]
    return any(needed.marker is not None and needed.marker.evaluate({"extra": "eval"}) for needed in ours)


def program() -> NoReturn:
    """The installed command: :func:`main`, and an exit that does not take torch down piece by piece (0.4 s)."""
    try:
        main()
    except SystemExit as ending:
        if "torch" not in sys.modules or "vllm" in sys.modules:  # vLLM's processes need their farewell
            raise
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(ending.code if isinstance(ending.code, int) else 0)
