"""A base or an adapter by name: a directory, or a Hugging Face Hub id with an optional @revision."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mergekit_bio.checkpoint.directory import INDEX, SINGLE, inside
from mergekit_bio.checkpoint.manifest import MANIFEST
from mergekit_bio.errors import SourceError
from mergekit_bio.outside_data import nearest, parse_yaml

_LICENCES = ("LICEN[CS]E*", "USE_POLICY*", "NOTICE*", "COPYING*")


def _any_case(pattern: str) -> str:
    """``"NO*"`` -> ``"[Nn][Oo]*"``, for the hub, which tells capitals from small letters."""
    return re.sub(r"\[\w+\]|[A-Z]", lambda found: f"[{found[0].strip('[]')}{found[0].strip('[]').lower()}]", pattern)


#: What a merge or an evaluation reads of a repository; the duplicates in other formats stay on the hub.
PATTERNS = (
    "*.safetensors", "*.json", "*.jinja", "*.txt", "*.md", "*.model", "*.tiktoken", "*.spm", "*.codes", "*.py",
    "tokenizer*", "*.tokenizer", *map(_any_case, _LICENCES),
)  # fmt: skip
_IGNORED = ("original/*", "*/*.safetensors", "onnx/*", "consolidated*.safetensors", "model.[!s]*.safetensors")
#: Meta renamed the repositories of Llama 3.1; many machines hold them under their first names.
_RENAMED = re.compile(r"meta-llama/(?P<first>Meta-)?Llama-3\.1-(?P<rest>.+)")
#: A LoRA of before safetensors; read as tensors alone, never unpickled.
_OLD_LORA = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True)
class Source:
    """Where something was found.

    Attributes:
        given: As the user named it.
        path: The directory on this machine.
        id: The hub id, if it came from there.
        revision: The hub commit, if it came from there.
    """

    given: str
    path: Path
    id: str | None = None
    revision: str | None = None

    @property
    def name(self) -> str:
        """The last part of its id or directory name."""
        return self.id.split("/")[-1] if self.id else self.path.resolve().name


def resolve(source: str | Path, *, patterns: Sequence[str] | None = None) -> Source:
    """Find ``source``, downloading it into the Hugging Face cache if it is a hub id that is not there yet.

    Args:
        source: A directory, or ``user/repo``, ``user/repo@revision`` or ``user/repo/folder``. A directory wins over a
            hub id.
        patterns: Which files of a repository are wanted; safetensors, configuration, tokenizer and licences by
            default.

    Raises:
        SourceError: It is neither, or the hub does not give it.
    """
    given = str(source)
    path = Path(source)
    if path.is_dir():
        try:
            str(path.resolve()).encode()
        except UnicodeEncodeError:
            raise SourceError(f"{given!r}: its name is not UTF-8, so no file can tell of it; rename it") from None
        return _from_directory(given, path)
    if path.exists():
        raise SourceError(f"{given}: is a file; name the directory that holds it, or a hub id")
    if path.parent.is_dir() and (merged := [file.parent.name for file in path.parent.glob(f"[!.]*/{MANIFEST}")]):
        raise SourceError(
            f"{given}: no such directory beside the checkpoints in {path.parent}{nearest(path.name, merged)}"
        )
    repo, folder, revision = _parts(given)
    if not is_hub_id(repo):
        raise SourceError(f"{given}: no such directory, and not a hub id (USER/REPO or USER/REPO@REVISION)")
    return _from_hub(given, _name_in_cache(repo, revision), folder, revision, patterns or PATTERNS)


@dataclass(frozen=True)
class MissingFiles:
    """What :func:`resolve` would download.

    Attributes:
        source: The hub id, as the user named it.
        files: How many files.
        bytes: Their sizes together, as the hub states them.
    """

    source: str
    files: int
    bytes: int


def missing_files(source: str | Path) -> MissingFiles:
    """What of ``source`` is not on this machine, by the hub's own listing; nothing of it is downloaded.

    Raises:
        SourceError: As :func:`resolve`.
    """
    given = str(source)
    repo, folder, revision = _parts(given)
    if Path(source).exists() or not is_hub_id(repo):
        resolve(source)
        return MissingFiles(given, 0, 0)
    from huggingface_hub import errors, snapshot_download

    name = _name_in_cache(repo, revision)

    def listed(patterns: Sequence[str]) -> list[Any]:
        """Every file that the patterns name, those in the cache too."""
        with without_bars():
            return snapshot_download(
                name,
                revision=revision,
                allow_patterns=_within(folder, patterns),
                ignore_patterns=_within(folder, _IGNORED),
                dry_run=True,
            )

    try:
        files = listed(PATTERNS)
        config, weights, old = _OLD_LORA
        names = {file.filename for file in files}
        if {*_within(folder, [config])} <= names and not {*_within(folder, [weights])} <= names:
            files += listed([old])
    except errors.DryRunError:  # the hub is switched off or does not answer: the cache may have everything
        resolve(source)
        return MissingFiles(given, 0, 0)
    except hub_errors() as error:
        raise SourceError(f"{given}: {_explain(error, name, revision)}") from error
    missing = [file for file in files if file.will_download]
    return MissingFiles(given, len(missing), sum(file.file_size or 0 for file in missing))


def on_this_machine(source: str | Path, *files: str) -> Path | None:
    """The directory of a source, if these files of it are on this machine; nothing is asked of the hub."""
    path = Path(source)
    if path.is_dir():
        return path if all((path / file).is_file() for file in files) else None
    repo, folder, revision = _parts(str(source))
    if not is_hub_id(repo):
        return None
    from huggingface_hub import try_to_load_from_cache

    name = _name_in_cache(repo, revision)
    cached = [try_to_load_from_cache(name, file, revision=revision) for file in _within(folder, files)]
    here = [Path(file).parent for file in cached if isinstance(file, str)]
    return here[0] if len(here) == len(files) else None


@contextmanager
def without_bars() -> Iterator[None]:
    """The hub client's progress bars are not shown while the block runs."""
    from huggingface_hub import utils

    shown = not utils.are_progress_bars_disabled()
    utils.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            utils.enable_progress_bars()


def hub_errors() -> tuple[type[Exception], ...]:
    """What the hub's client raises: errors of its own, of the disk, and of the HTTP library below it."""
    from huggingface_hub.errors import HfHubHTTPError

    # The client's own errors are OSErrors, or an HTTPError of whichever library this release of it uses.
    return (*HfHubHTTPError.__bases__, OSError)


def _from_directory(given: str, path: Path) -> Source:
    # A snapshot folder of the Hugging Face cache still knows where it came from: models--USER--REPO/snapshots/COMMIT.
    home = path.resolve()
    cache = home.parent.parent.name
    if home.parent.name == "snapshots" and cache.startswith("models--"):
        return Source(given, path, cache.removeprefix("models--").replace("--", "/", 1), home.name)
    return Source(given, path)


def _name_in_cache(repo: str, revision: str | None) -> str:
    """The name under which a renamed repository is in the local cache; ``repo`` itself where it is not a matter."""
    from huggingface_hub import try_to_load_from_cache

    renamed = _RENAMED.fullmatch(repo)
    if renamed is None:
        return repo
    other = f"meta-llama/{'' if renamed['first'] else 'Meta-'}Llama-3.1-{renamed['rest']}"

    def cached(name: str) -> bool:
        return any(isinstance(try_to_load_from_cache(name, file, revision=revision), str) for file in (SINGLE, INDEX))

    return other if not cached(repo) and cached(other) else repo


def _parts(given: str) -> tuple[str, str, str | None]:
    """Repository, folder in it (empty for the whole) and revision of ``USER/REPO/FOLDER@REVISION``."""
    name, _, revision = given.partition("@")
    parts = name.split("/")
    if len(parts) < 3 or "" in parts or ".." in parts:
        return name, "", revision or None
    return "/".join(parts[:2]), "/".join(parts[2:]), revision or None


def _within(folder: str, patterns: Sequence[str]) -> list[str]:
    """Patterns of a repository's files that are meant in one of its folders."""
    return [f"{folder}/{pattern}" for pattern in patterns] if folder else list(patterns)


def _from_hub(given: str, repo: str, folder: str, revision: str | None, patterns: Sequence[str]) -> Source:
    from huggingface_hub import snapshot_download

    wanted, unwanted = _within(folder, patterns), _within(folder, _IGNORED)
    try:
        snapshot = Path(snapshot_download(repo, revision=revision, allow_patterns=wanted, ignore_patterns=unwanted))
        config, weights, old = (snapshot / folder / name for name in _OLD_LORA)
        if patterns is PATTERNS and config.exists() and not weights.exists() and not old.exists():
            snapshot_download(repo, revision=snapshot.name, allow_patterns=_within(folder, [old.name]))
    except hub_errors() as error:
        raise SourceError(f"{given}: {_explain(error, repo, revision)}") from error
    if not (snapshot / folder).is_dir():
        raise SourceError(f"{given}: the repository {repo} has no folder {folder}")
    return Source(given, snapshot / folder, repo, snapshot.name)


def _explain(error: Exception, repo: str, revision: str | None) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        page = f"https://huggingface.co/{repo}"
        return f"this repository is gated; accept its licence at {page} and log in with `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the repository has no revision {revision!r}"
    if isinstance(error, errors.RepositoryNotFoundError):
        private = "(or a private one: log in with `hf auth login`)"
        return f"no such directory here, and no such repository on the hub {private}"
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        unreachable = "not a directory, not in the local cache, and the hub cannot be reached"
        return f"{unreachable}; connect, or give the path of a copy"
    if not isinstance(error, errors.HfHubHTTPError):
        return f"cannot be fetched: {error}"
    if error.response.status_code == 401:
        return "the hub does not accept your token; renew it with `hf auth login`"
    return f"the hub answered: {str(error).splitlines()[0]}"


def is_hub_id(repo: str) -> bool:
    """Whether ``repo`` has the form USER/REPO, with the characters that the hub allows."""
    if repo.count("/") != 1:
        return False
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError:
        return False
    return True


def licence_files(source: Source) -> list[str]:
    """Names of the licence files of a source, in capitals or not."""
    names = [path.name for path in source.path.iterdir() if path.is_file() and not path.name.endswith("~")]
    return sorted(name for name in names if any(fnmatchcase(name.upper(), pattern) for pattern in _LICENCES))


def stated_licence(source: Source) -> str | None:
    """The licence that the source's model card states in its metadata; several in one text, parted by commas."""
    card = source.path / "README.md"
    if not card.is_file():
        return None
    text = inside(source.path, card.name).read_text(encoding="utf-8", errors="replace")
    front = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    if not front:
        return None
    try:
        metadata = parse_yaml(front[1], source=card, error=SourceError).data
    except SourceError:  # a title with a colon is enough; the licence still has to be seen
        line = re.search(r"^license:[ \t]*[\"']?([\w.-]+)", front[1], re.MULTILINE)
        return line[1] if line else None
    stated = metadata.get("license") if isinstance(metadata, dict) else None
    licences = stated if isinstance(stated, list) else [stated]
    return ", ".join(licence for licence in licences if isinstance(licence, str) and licence) or None
