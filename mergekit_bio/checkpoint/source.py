"""A base or an adapter by name: a directory, or a Hugging Face Hub id with an optional @revision."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mergekit_bio.checkpoint.checkpoint import inside
from mergekit_bio.errors import SourceError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

#: What a merge or an evaluation reads of a repository; the duplicates in other formats stay on the hub.
PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.md", "*.model", "LICEN*", "USE_POLICY*", "NOTICE*")
_LICENCES = ("LICEN[CS]E*", "USE_POLICY*", "NOTICE*", "COPYING*")
_IGNORED = ("original/*", "*/*.safetensors", "onnx/*")


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
        source: A directory, or ``user/repo`` or ``user/repo@revision``. A directory wins over a hub id.
        patterns: Which files of a repository are wanted; safetensors, configuration, tokenizer and licences by
            default.

    Raises:
        SourceError: It is neither, or the hub does not give it.
    """
    given = str(source)
    path = Path(source)
    if path.is_dir():
        return _from_directory(given, path)
    if path.exists():
        raise SourceError(f"{given}: is a file; name the directory that holds it, or a hub id")
    repo, _, revision = given.partition("@")
    if not _HUB_ID.fullmatch(repo) or ".." in repo:
        raise SourceError(f"{given}: no such directory, and not a hub id (USER/REPO or USER/REPO@REVISION)")
    return _from_hub(given, repo, revision or None, patterns or PATTERNS)


def _from_directory(given: str, path: Path) -> Source:
    # A snapshot folder of the Hugging Face cache still knows where it came from: models--USER--REPO/snapshots/COMMIT.
    home = path.resolve()
    cache = home.parent.parent.name
    if home.parent.name == "snapshots" and cache.startswith("models--"):
        return Source(given, path, cache.removeprefix("models--").replace("--", "/", 1), home.name)
    return Source(given, path)


def _from_hub(given: str, repo: str, revision: str | None, patterns: Sequence[str]) -> Source:
    from huggingface_hub import errors, snapshot_download

    try:
        folder = snapshot_download(
            repo, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(_IGNORED)
        )
    except errors.GatedRepoError as error:
        raise SourceError(
            f"{given}: this repository is gated; accept its licence at https://huggingface.co/{repo} and log in with "
            "`hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise SourceError(f"{given}: the repository has no revision {revision!r}") from error
    except errors.RepositoryNotFoundError as error:
        raise SourceError(
            f"{given}: no such directory here, and no such repository on the hub (or a private one: log in with "
            "`hf auth login`)"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise SourceError(
            f"{given}: not a directory, not in the local cache, and the hub cannot be reached; connect, or give the "
            "path of a copy"
        ) from error
    except errors.HfHubHTTPError as error:
        if error.response.status_code == 401:
            raise SourceError(f"{given}: the hub does not accept your token; renew it with `hf auth login`") from error
        raise SourceError(f"{given}: the hub answered: {str(error).splitlines()[0]}") from error
    except OSError as error:
        raise SourceError(f"{given}: cannot be fetched: {error}") from error
    return Source(given, Path(folder), repo, Path(folder).name)


def licence_files(source: Source) -> list[str]:
    """Names of the licence files of a source."""
    return sorted({path.name for pattern in _LICENCES for path in source.path.glob(pattern) if path.is_file()})


def stated_licence(source: Source) -> str | None:
    """The licence that the source's model card states in its metadata."""
    card = source.path / "README.md"
    if not card.is_file():
        return None
    front = re.match(r"---\s*\n(.*?)\n---\s*\n", inside(source.path, card.name).read_text(errors="replace"), re.DOTALL)
    stated = re.search(r"^license:\s*[\"']?([\w.-]+)", front[1], re.MULTILINE) if front else None
    return stated[1] if stated else None
