"""Publish a merged checkpoint on the Hugging Face Hub, or its receipt: verified first, resumable, in one commit.

Every file is sent on its own through the hub's commit API and then all are committed together, so the repository
shows either its old state or the whole new one. Storage on the hub is addressed by content: a push that was cut off
is resumed by running it again, which sends only what did not arrive (whole files over LFS, chunks over Xet).
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from mergekit_bio import __version__
from mergekit_bio.checkpoint.digest import file_sha256
from mergekit_bio.checkpoint.manifest import CARD, MANIFEST, Manifest, checkpoints_of_sweep, read_manifest
from mergekit_bio.checkpoint.source import is_hub_id
from mergekit_bio.errors import HubError
from mergekit_bio.merging.card import receipt_card, sweep_card

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile

#: Never published: hidden files, locks, and what is unfinished.
_PRIVATE = (".*", "*.lock", "*.partial", "*.incomplete", "*.part", "*.tmp", "*~", "__pycache__")

#: Weights that loaders find by name: left from another push, they would be loaded instead of these.
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")

_RESUME = "run the same command again: what has arrived is not sent twice"


#: What is published: a file of the directory, or a text made for the hub.
_Content: TypeAlias = Path | bytes
#: Device and number of a file's inode: the same for all its names.
_Inode: TypeAlias = tuple[int, int]


@dataclass(frozen=True)
class PushedFile:
    """One file of a push.

    Attributes:
        path: Relative to the directory, and to the repository.
        bytes: Its size.
        state: ``"planned"`` in a dry run; ``"unchanged"`` where the repository holds the same content already;
            ``"shared"`` where another checkpoint of a sweep has sent it.
    """

    path: str
    bytes: int
    state: Literal["planned", "uploaded", "unchanged", "shared"]


@dataclass(frozen=True)
class PushReport:
    """What a push did, or in a dry run would do.

    Attributes:
        url: The repository's page; of a sweep's checkpoint, its branch's.
        commit: The commit that holds the files; None in a dry run.
        files: Every file of the checkpoint.
        removed: Weight files of an earlier push that the commit deleted, because loaders would prefer or mix them.
        left_out: Files and folders of the directory that are never published (hidden, locks, unfinished).
        notes: What a user should know, one line each.
    """

    url: str
    commit: str | None
    files: tuple[PushedFile, ...]
    removed: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Upload:
    """One commit to be made: what to publish, and on which branch."""

    title: str
    contents: Mapping[str, _Content]
    branch: str | None = None
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def brings_weights(self) -> bool:
        return any(_WEIGHTS.fullmatch(path) for path in self.contents)


def push(
    directory: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    receipt: bool = False,
    dry_run: bool = False,
    progress: Callable[[PushedFile], None] = lambda _: None,
) -> PushReport:
    """Upload the merged checkpoint in ``directory`` to ``repo_id``, creating the repository if need be.

    Args:
        directory: One merged checkpoint.
        repo_id: ``USER/REPO``.
        private: Create the repository private; an existing public one is refused.
        revision: An existing branch; ``main`` by default.
        receipt: Publish the receipt (``merge.json``) and a card that says how to rebuild the checkpoint from it, and
            none of its weights.
        dry_run: Verify and list the files; the hub is not contacted.
        progress: Called with each file when it has arrived, or was found unchanged.

    Raises:
        HubError: The directory holds no single checkpoint, or the hub refuses or cannot be reached.
        VerificationError: The directory is not what its ``merge.json`` says.
    """
    check_ready(repo_id, dry_run=dry_run)
    upload = replace(_prepare(Path(directory), repo_id, receipt=receipt), branch=revision)
    if dry_run:
        return _planned(upload, repo_id)
    with _explained(repo_id, revision):
        return _Repository(repo_id, private=private, branch=revision).commit(upload, progress)


def push_sweep(
    directory: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    receipt: bool = False,
    dry_run: bool = False,
    progress: Callable[[PushedFile], None] = lambda _: None,
) -> tuple[PushReport, ...]:
    """Upload all checkpoints of a sweep to one repository, each to a branch of its own: ``alpha-0.50``.

    What they share is sent once. The branch ``main`` gets a card that lists them.

    Args:
        directory: What a merge at several strengths has written.
        repo_id: ``USER/REPO``.
        private: As of :func:`push`; so are the others.

    Returns:
        A report for each checkpoint, in the order of their names.

    Raises:
        MergekitBioError: As of :func:`push`.
    """
    directory = Path(directory)
    check_ready(repo_id, dry_run=dry_run)
    folders = checkpoints_of_sweep(directory)
    if not folders:
        raise HubError(f"{directory}: holds no merged checkpoints")
    manifests = {folder.name: read_manifest(folder) for folder in folders}
    _check_one_sweep(directory, manifests)
    uploads = [
        replace(_prepare(folder, f"{repo_id}@{folder.name}", receipt=receipt), branch=folder.name) for folder in folders
    ]

    def of_branch(report: PushReport, upload: _Upload) -> PushReport:
        return replace(report, url=f"{report.url}/tree/{upload.branch}")

    if dry_run:
        sent: set[_Inode] = set()
        return tuple(of_branch(_planned(upload, repo_id, sent), upload) for upload in uploads)
    card = sweep_card({name: asdict(manifest) for name, manifest in manifests.items()}, repo_id)
    with _explained(repo_id, None):
        repository = _Repository(repo_id, private=private)
        if any(_WEIGHTS.fullmatch(path) for path in repository.files(None)):
            raise HubError(f"{repo_id}: its main branch holds a checkpoint; push the sweep to another repository")
        reports = []
        for upload in uploads:
            repository.make_branch(str(upload.branch))
            reports.append(of_branch(repository.commit(upload, progress), upload))
        repository.commit(_Upload(f"the card of {directory.resolve().name}", {CARD: card.encode()}), lambda _: None)
        return tuple(reports)


def _check_one_sweep(directory: Path, manifests: Mapping[str, Manifest]) -> None:
    """Refuse checkpoints that differ in more than their strengths: one card cannot tell of them."""

    def merged_from(manifest: Manifest) -> dict[str, object]:
        return {
            "base": manifest.base.fingerprint,
            "adapters": [adapter.fingerprint for adapter in manifest.adapters],
            **{key: getattr(manifest, key) for key in ("dtype", "rounding", "seed", "text_only")},
        }

    (first, of_first), *others = ((name, merged_from(manifest)) for name, manifest in manifests.items())
    for name, of_other in others:
        if differing := [key for key, value in of_first.items() if of_other[key] != value]:
            raise HubError(
                f"{directory}: is no sweep: {first} and {name} were merged with different {' and '.join(differing)}; "
                "push each to a repository of its own"
            )


def _prepare(directory: Path, name: str, *, receipt: bool) -> _Upload:
    """Verify a checkpoint, and collect what of it is to be published; ``name`` is what it will be known by."""
    from mergekit_bio.merging.verify import verify

    paths, left_out = _list_files(directory)
    _check_single_checkpoint(directory, paths, name)
    verify(directory)
    title = f"Upload {directory.resolve().name}"
    if not receipt:
        return _Upload(title, {path: directory / path for path in paths}, left_out=left_out)
    manifest = read_manifest(directory)
    if manifest.is_old:
        raise HubError(
            f"{directory / MANIFEST}: is of format {manifest.format!r}, from which a checkpoint cannot be rebuilt; "
            "merge again, or push it whole"
        )
    card = receipt_card(asdict(manifest), name)
    notes = tuple(
        f"{origin.name} is known by its directory only: who rebuilds this must have it, and name it with {option}"
        for origin, option in [(manifest.base, "--base"), *((adapter, "--adapter") for adapter in manifest.adapters)]
        if origin.id is None
    )
    return _Upload(
        f"{title}, its receipt", {MANIFEST: directory / MANIFEST, CARD: card.encode()}, left_out=left_out, notes=notes
    )


def _planned(upload: _Upload, repo_id: str, sent: set[_Inode] | None = None) -> PushReport:
    """What a push would do; ``sent`` are the linked files that were planned before, and gets this one's."""
    from huggingface_hub import constants

    sent = set() if sent is None else sent
    files = []
    for path, content in upload.contents.items():
        inode = _linked_inode(content)
        files.append(PushedFile(path, _size(content), "shared" if inode in sent else "planned"))
        sent |= {inode} if inode else set()
    return PushReport(f"{constants.ENDPOINT}/{repo_id}", None, tuple(files), (), upload.left_out, upload.notes)


def _size(content: _Content) -> int:
    return content.stat().st_size if isinstance(content, Path) else len(content)


@contextmanager
def _explained(repo_id: str, revision: str | None) -> Iterator[None]:
    """What the hub's client raises while the block runs, in one line."""
    from huggingface_hub import errors

    try:
        yield
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


class _Repository:
    """A repository on the hub, made if need be.

    Args:
        repo_id: ``USER/REPO``.
        private: Whether it must be private.
        branch: One of its branches; None for ``main``.
    """

    def __init__(self, repo_id: str, *, private: bool, branch: str | None = None) -> None:
        from huggingface_hub import HfApi

        self._id = repo_id
        self._api = HfApi(library_name="mergekit-bio", library_version=__version__)
        self._url = str(self._api.create_repo(repo_id, private=private or None, exist_ok=True))
        # Files that several checkpoints share by hard links: where they have gone (branch and path), and their sha256.
        self._sent: dict[_Inode, tuple[str, str]] = {}
        self._sha256: dict[_Inode, str] = {}
        if private and not self._api.repo_info(repo_id, revision=branch).private:
            raise HubError(
                f"{repo_id}: exists and is public; make it private in its settings, or push without --private"
            )

    def make_branch(self, branch: str) -> None:
        """Make a branch, unless it is there."""
        self._api.create_branch(self._id, branch=branch, exist_ok=True)

    def files(self, branch: str | None) -> "dict[str, RepoFile]":
        """What a branch holds."""
        from huggingface_hub.hf_api import RepoFile

        tree = self._api.list_repo_tree(self._id, recursive=True, revision=branch)
        return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}

    def commit(self, upload: _Upload, progress: Callable[[PushedFile], None]) -> PushReport:
        """Send what is not there yet, then show all of it at once."""
        from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete

        branch = upload.branch
        commit = self._api.repo_info(self._id, revision=branch).sha
        remote = self.files(branch)
        files: list[PushedFile] = []
        operations: list[CommitOperationAdd | CommitOperationCopy | CommitOperationDelete] = []
        linked: dict[_Inode, str] = {}
        for path, content in upload.contents.items():
            inode = _linked_inode(content)
            state: Literal["uploaded", "unchanged", "shared"] = "uploaded"
            if self._unchanged(content, remote.get(path)):
                state = "unchanged"
            elif inode in self._sent:
                source_branch, source_path = self._sent[inode]
                operations.append(CommitOperationCopy(source_path, path, src_revision=source_branch))
                state = "shared"
            else:
                addition = CommitOperationAdd(path, content)
                self._api.preupload_lfs_files(self._id, [addition], revision=branch)
                operations.append(addition)
            if inode is not None:
                linked[inode] = path
            files.append(PushedFile(path, _size(content), state))
            progress(files[-1])

        stale = sorted(path for path in remote.keys() - upload.contents.keys() if _WEIGHTS.fullmatch(path))
        if stale and not upload.brings_weights:
            raise HubError(f"{self._id}: holds a checkpoint's weights ({stale[0]}); push this to another repository")
        operations += [CommitOperationDelete(path) for path in stale]
        if operations:
            message = f"{upload.title} with mergekit-bio {__version__}"
            commit = self._api.create_commit(self._id, operations, commit_message=message, revision=branch).oid
        self._sent |= {inode: (branch or "main", path) for inode, path in linked.items()}
        return PushReport(self._url, commit, tuple(files), tuple(stale), upload.left_out, upload.notes)

    def _unchanged(self, content: _Content, remote: "RepoFile | None") -> bool:
        """Whether the repository holds this file already."""
        size = _size(content)
        if remote is None or remote.size != size:
            return False
        if remote.lfs is not None and isinstance(content, Path):
            inode = _linked_inode(content)
            sha256 = self._sha256.get(inode) if inode else None
            sha256 = sha256 or file_sha256(content)
            if inode is not None:
                self._sha256[inode] = sha256
            return sha256 == remote.lfs.sha256
        data = content.read_bytes() if isinstance(content, Path) else content
        return hashlib.sha1(b"blob %d\0" % size + data).hexdigest() == remote.blob_id


def _linked_inode(content: _Content) -> _Inode | None:
    """What tells that two files are one, for a file with several names."""
    found = content.stat() if isinstance(content, Path) else None
    return (found.st_dev, found.st_ino) if found and found.st_nlink > 1 else None


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
            f"{directory}: holds {len(inner)} checkpoints ({', '.join(inner)}); push one of them, "
            f"such as: mergekit-bio push {directory / inner[0]} {repo_id}-{inner[0].replace('/', '-')}"
        )
    if MANIFEST not in paths:
        raise HubError(f"{directory}: not a merged checkpoint: it has no {MANIFEST}")


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
