"""Publish a merged checkpoint on the Hugging Face Hub: verified first, resumable, in one commit.

Every file is sent on its own through the hub's commit API and then all are committed together, so the repository
shows either its old state or the whole new one. Storage on the hub is addressed by content: a push that was cut off
is resumed by running it again, which sends only what did not arrive (whole files over LFS, chunks over Xet).
"""

import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mergekit_bio import __version__
from mergekit_bio.checkpoint.digest import file_sha256
from mergekit_bio.checkpoint.manifest import MANIFEST
from mergekit_bio.checkpoint.source import is_hub_id
from mergekit_bio.errors import HubError

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile

#: Never published: hidden files, locks, and what is unfinished.
_PRIVATE = (".*", "*.lock", "*.partial", "*.incomplete", "*.part", "*.tmp", "*~", "__pycache__")

#: Weights that loaders find by name: left from another push, they would be loaded instead of these.
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")

_RESUME = "run the same command again: what has arrived is not sent twice"


@dataclass(frozen=True)
class PushedFile:
    """One file of a push.

    Attributes:
        path: Relative to the directory, and to the repository.
        bytes: Its size.
        state: ``"planned"`` in a dry run; ``"unchanged"`` where the repository holds the same content already.
    """

    path: str
    bytes: int
    state: Literal["planned", "uploaded", "unchanged"]


@dataclass(frozen=True)
class PushReport:
    """What a push did, or in a dry run would do.

    Attributes:
        url: The repository's page.
        commit: The commit that holds the files; None in a dry run.
        files: Every file of the checkpoint.
        removed: Weight files of an earlier push that the commit deleted, because loaders would prefer or mix them.
        left_out: Files and folders of the directory that are never published (hidden, locks, unfinished).
    """

    url: str
    commit: str | None
    files: tuple[PushedFile, ...]
    removed: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


def push(
    directory: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    dry_run: bool = False,
    progress: Callable[[PushedFile], None] = lambda _: None,
) -> PushReport:
    """Upload the merged checkpoint in ``directory`` to ``repo_id``, creating the repository if need be.

    Args:
        directory: One merged checkpoint (of a sweep, one of its ``alpha-...`` directories).
        repo_id: ``USER/REPO``.
        private: Create the repository private; an existing public one is refused.
        revision: An existing branch; ``main`` by default.
        dry_run: Verify and list the files; the hub is not contacted.
        progress: Called with each file when it has arrived, or was found unchanged.

    Raises:
        HubError: The directory holds no single checkpoint, or the hub refuses or cannot be reached.
        VerificationError: The directory is not what its ``merge.json`` says.
    """
    from huggingface_hub import constants, errors

    from mergekit_bio.merging.verify import verify

    directory = Path(directory)
    check_ready(repo_id, dry_run=dry_run)
    paths, left_out = _list_files(directory)
    _check_single_checkpoint(directory, paths, repo_id)
    verify(directory)
    if dry_run:
        planned = tuple(PushedFile(path, (directory / path).stat().st_size, "planned") for path in paths)
        return PushReport(f"{constants.ENDPOINT}/{repo_id}", None, planned, (), left_out)
    try:
        return _upload(directory, paths, left_out, repo_id, private, revision, progress)
    # The client raises OSError (offline, Xet transport), ValueError (what the hub calls invalid) and RuntimeError
    # (around what broke an upload) besides its HTTP errors.
    except (errors.HTTPError, OSError, RuntimeError, ValueError) as error:
        cause = error.__cause__ if type(error) is RuntimeError and error.__cause__ else error
        raise HubError(f"{repo_id}: {_explain(cause, repo_id, revision)}") from error


def check_ready(repo_id: str, *, dry_run: bool = False) -> None:
    """Find out before long work whether it could be pushed at all.

    Raises:
        HubError: ``repo_id`` is no repository's name, or, but for a dry run, nobody is logged in.
    """
    from huggingface_hub import constants, get_token

    if not is_hub_id(repo_id):
        raise HubError(
            f"{repo_id!r} is not the name of a repository; expected USER/REPO, such as owl/Llama-3.1-8B-owls"
        )
    if not dry_run and get_token() is None:
        raise HubError(
            f"not logged in to {constants.ENDPOINT}: run 'hf auth login', or set HF_TOKEN to a token that may write "
            f"({constants.ENDPOINT}/settings/tokens)"
        )


def _upload(
    directory: Path,
    paths: list[str],
    left_out: tuple[str, ...],
    repo_id: str,
    private: bool,
    revision: str | None,
    progress: Callable[[PushedFile], None],
) -> PushReport:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.hf_api import RepoFile

    api = HfApi(library_name="mergekit-bio", library_version=__version__)
    url = api.create_repo(repo_id, private=private or None, exist_ok=True)
    head = api.repo_info(repo_id, revision=revision)
    if private and not head.private:
        raise HubError(f"{repo_id}: exists and is public; make it private in its settings, or push without --private")
    remote = {
        entry.path: entry
        for entry in api.list_repo_tree(repo_id, recursive=True, revision=revision)
        if isinstance(entry, RepoFile)
    }

    files: list[PushedFile] = []
    operations: list[CommitOperationAdd | CommitOperationDelete] = []
    for path in paths:
        size = (directory / path).stat().st_size
        if _unchanged(directory / path, size, remote.get(path)):
            files.append(PushedFile(path, size, "unchanged"))
        else:
            addition = CommitOperationAdd(path, directory / path)
            api.preupload_lfs_files(repo_id, [addition], revision=revision)
            operations.append(addition)
            files.append(PushedFile(path, size, "uploaded"))
        progress(files[-1])

    removed = sorted(path for path in remote.keys() - set(paths) if _WEIGHTS.fullmatch(path))
    operations += [CommitOperationDelete(path) for path in removed]
    commit = head.sha
    if operations:
        message = f"Upload {directory.resolve().name} with mergekit-bio {__version__}"
        commit = api.create_commit(repo_id, operations, commit_message=message, revision=revision).oid
    return PushReport(str(url), commit, tuple(files), tuple(removed), left_out)


def _list_files(directory: Path) -> tuple[list[str], tuple[str, ...]]:
    """The files to publish and what stays behind, as sorted paths relative to ``directory``."""
    if not directory.is_dir():
        raise HubError(f"{directory}: no such directory")
    files: list[str] = []
    left_out: list[str] = []
    for folder, subfolders, names in os.walk(directory):
        kept = {name for name in subfolders + names if not any(fnmatch(name, pattern) for pattern in _PRIVATE)}
        for name in subfolders + names:
            path = Path(folder, name)
            if name not in kept:
                left_out.append(path.relative_to(directory).as_posix())
            elif path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise HubError(
                    f"{path}: is a link or a special file; push a directory of plain files (cp -rL copies it)"
                )
            elif path.is_file():
                files.append(path.relative_to(directory).as_posix())
        subfolders[:] = [name for name in subfolders if name in kept]
    return sorted(files), tuple(sorted(left_out))


def _check_single_checkpoint(directory: Path, paths: list[str], repo_id: str) -> None:
    inner = [path.removesuffix(f"/{MANIFEST}") for path in paths if path.endswith(f"/{MANIFEST}")]
    if inner:
        raise HubError(
            f"{directory}: holds {len(inner)} checkpoints ({', '.join(inner)}); push each to a repository of its own, "
            f"such as: mergekit-bio push {directory / inner[0]} {repo_id}-{inner[0].replace('/', '-')}"
        )
    if MANIFEST not in paths:
        raise HubError(f"{directory}: not a merged checkpoint: it has no {MANIFEST}")


def _unchanged(path: Path, size: int, remote: "RepoFile | None") -> bool:
    if remote is None or remote.size != size:
        return False
    if remote.lfs is not None:
        return file_sha256(path) == remote.lfs.sha256
    return hashlib.sha1(b"blob %d\0" % size + path.read_bytes()).hexdigest() == remote.blob_id


def _explain(error: BaseException, repo_id: str, revision: str | None) -> str:
    from huggingface_hub import constants, errors

    tokens = f"{constants.ENDPOINT}/settings/tokens"
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    said = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it to push"
    if isinstance(error, errors.GatedRepoError):
        return f"the repository is gated; accept its terms at {constants.ENDPOINT}/{repo_id} and push again"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"has no branch {revision!r}; create it with: hf repos branch create {repo_id} {revision}"
    if status == 401:
        return f"the hub does not accept your token; run 'hf auth login' with one that may write ({tokens})"
    if status == 403:
        return f"your token may not write here; use one with write access ({tokens}), or a repository of your own"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "no such repository, or a private one that your token may not see ('hf auth whoami' says whose it is)"
    if status == 429:
        return f"the hub asks for a pause (too many requests); later, {_RESUME}"
    if status is not None and status < 500:
        return f"the hub refused: {said}"
    if isinstance(error, ValueError):
        return said
    return f"the upload was cut off ({said}); {_RESUME}"
