"""``merge.json``: where a merged checkpoint came from and how to check it."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from mergekit_bio.checkpoint.directory import inside
from mergekit_bio.checkpoint.header import StoredTensor
from mergekit_bio.errors import CheckpointError, MergekitBioError, OutputError, VerificationError
from mergekit_bio.outside_data import FORBID_EXTRA, Document, read_json

MANIFEST = "merge.json"
CARD = "README.md"
FORMAT = "mergekit-bio/merge@2"
#: Of before the files beside the weights were recorded; otherwise the same. It is read, and not written any more.
_FIRST_FORMAT = "mergekit-bio/merge@1"


@dataclass(frozen=True, kw_only=True)
class Origin:
    """A base or an adapter.

    Attributes:
        source: As the user named it.
        name: The last part of its id or directory name.
        id: Hub id.
        revision: Hub commit.
        fingerprint: :func:`fingerprint` of its tensors.
        license: The licence its card states.
        license_files: Licence files carried along.
    """

    source: str
    name: str
    id: str | None
    revision: str | None
    fingerprint: str
    license: str | None
    license_files: list[str]


@dataclass(frozen=True, kw_only=True)
class BaseOrigin(Origin):
    """The base."""

    model_type: str | None


@dataclass(frozen=True)
class Strength:
    """One adapter's alpha: a default and exceptions by module or layer range."""

    default: float
    modules: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class AdapterOrigin(Origin):
    """An adapter, with what was made of it.

    ``base_weights`` are the tensors of the base in whose place the adapter's own were taken, at every strength: the
    base's name -> the adapter's.
    """

    kind: str
    peft_type: str | None
    alpha: Strength
    scaling: dict[str, int]
    deltas: int
    base_weights: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class FileRecord:
    """A shard: its size, and the sha256 of its header."""

    bytes: int
    header_sha256: str


@dataclass(frozen=True)
class TensorRecord:
    """A tensor that was computed: sha256 of its bytes as written."""

    sha256: str


@dataclass(frozen=True)
class RoundingLoss:
    """How much of the deltas rounding lost, for one module type or for all together.

    ``d`` is the delta at its strength, ``e = round(W0 + d) - (W0 + d)`` the error.

    Attributes:
        modules: ``"self_attn.q_proj"``, or ``"total"``.
        tensors: How many.
        elements: How many weights they have.
        delta_over_weight: ``||d|| / ||W0||``.
        loss: ``||e|| / ||d||`` of the rounding used.
        bias: ``|<e, d>| / <d, d>`` of the rounding used.
        loss_nearest: The loss, had it been rounded to nearest.
        bias_nearest: The bias, had it been rounded to nearest.
    """

    modules: str
    tensors: int
    elements: int
    delta_over_weight: float
    loss: float
    bias: float
    loss_nearest: float
    bias_nearest: float


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The whole of ``merge.json``.

    Attributes:
        shared: Names of ``files`` that are hard links, and the directories of the sweep ``with`` which they are shared.
        files: The shards.
        companions: The files beside them, name -> sha256: configuration, tokenizer, licences; none of a manifest of the
            first format. The model card is not among them: it is for people to go on writing.
        tensors: What was computed; the other tensors are copies.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA

    format: str
    created: str
    version: str
    command: str
    base: BaseOrigin
    adapters: list[AdapterOrigin]
    alpha: str
    dtype: str
    rounding: str
    seed: int
    device: str
    audio_prefix: bool
    text_only: bool
    untied: bool
    shared: dict[Literal["files", "with"], list[str]] | None
    versions: dict[str, str]
    rounding_loss: list[RoundingLoss]
    files: dict[str, FileRecord]
    companions: dict[str, str]
    tensors: dict[str, TensorRecord]

    def to_json(self) -> str:
        """As it is written."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"


def read_manifest(directory: Path) -> Manifest:
    """Read ``merge.json`` of a merged checkpoint.

    Raises:
        VerificationError: There is none, or it is not one of ours.
    """
    if not (directory / MANIFEST).is_file():
        several = sorted(path.parent.name for path in directory.glob(f"*/{MANIFEST}"))
        hint = f"; it is a sweep, name one of its checkpoints: {', '.join(several)}" if several else ""
        raise VerificationError(f"{directory}: has no {MANIFEST}, so mergekit-bio did not write it{hint}")
    try:
        file = inside(directory, MANIFEST)
    except CheckpointError as error:
        raise VerificationError(str(error)) from error
    document = read_json(file, error=VerificationError)
    if document.get("format") == _FIRST_FORMAT:
        document = {"companions": {}} | document
    elif document.get("format") != FORMAT:
        raise VerificationError(
            f"{directory / MANIFEST}: format {document.get('format')!r} is not {FORMAT!r}, this version's; merge again"
        )
    return Document(directory / MANIFEST, document, VerificationError).checked(Manifest)


def foreign_file(directory: Path) -> str | None:
    """Name something in a merged checkpoint's directory that its merge has not written.

    Raises:
        OutputError: Its ``merge.json`` does not tell.
    """
    try:
        manifest = read_manifest(directory)
    except MergekitBioError as error:
        raise OutputError(f"{error}; it is not overwritten, remove {directory} by hand") from None
    if manifest.format == _FIRST_FORMAT:
        raise OutputError(
            f"{directory / MANIFEST}: format {_FIRST_FORMAT!r} does not tell every file that the merge wrote; it is "
            f"not overwritten, remove {directory} by hand"
        )
    ours = {MANIFEST, CARD, *manifest.files, *manifest.companions}
    return next((path.name for path in sorted(directory.iterdir()) if path.name not in ours), None)


def fingerprint(tensors: Mapping[str, StoredTensor]) -> str:
    """Identify weights without reading all of them: sha256 over each tensor's name, dtype, shape and both ends.

    It does not depend on how the tensors are spread over files.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}\0{tensor.dtype}\0{tensor.shape}\0".encode())
        digest.update(tensor.ends())
    return digest.hexdigest()
