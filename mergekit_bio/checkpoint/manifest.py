"""``merge.json``: where a merged checkpoint came from, how to check it, and all that is needed to make it again."""

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
FORMAT = "mergekit-bio/merge@3"
#: Of before the files beside the weights were recorded.
_FIRST_FORMAT = "mergekit-bio/merge@1"
#: Read, and not written any more. What they lack had these values.
_OLD_FORMATS: dict[str, dict[str, Any]] = {
    _FIRST_FORMAT: {"companions": {}, "arithmetic": 1, "tokenizer": "auto", "sweep": []},
    "mergekit-bio/merge@2": {"arithmetic": 1, "tokenizer": "auto", "sweep": []},
}


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
    """One adapter's alpha: a default and exceptions by module or layer, numbers or ramps (``"0.2..0.8"``)."""

    default: float
    modules: dict[str, float | str]


@dataclass(frozen=True, kw_only=True)
class AdapterOrigin(Origin):
    """An adapter, with what was made of it.

    Attributes:
        kind: ``"peft"``, ``"naturelm-audio"`` or ``"finetune"``.
        peft_type: As its ``adapter_config.json`` says.
        alpha: Its strength.
        own_alpha: Whether that is its own, whatever the merge's.
        scaling: How many deltas are scaled in which way.
        deltas: How many.
        base_weights: The tensors of the base in whose place the adapter's own were taken, at every strength: the base's
            name -> the adapter's.
    """

    kind: str
    peft_type: str | None
    alpha: Strength
    scaling: dict[str, int]
    deltas: int
    base_weights: dict[str, str] = field(default_factory=dict)
    own_alpha: bool = False


@dataclass(frozen=True)
class FileRecord:
    """A shard: its size, the sha256 of its header, and that of the whole file if the merge was asked for it."""

    bytes: int
    header_sha256: str
    sha256: str | None = None


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
        arithmetic: The version of the arithmetic that computed ``tensors``: the same version gives the same bytes.
        tokenizer: Whose tokenizer was asked for.
        sweep: All strengths of a sweep that stores what they have in common once, as the command line takes them: they
            decide which tensor is in which file. Empty where this checkpoint stands alone.
        shared: Names of ``files`` that are hard links, and the directories of the sweep ``with`` which they are shared.
        files: The shards.
        companions: The files beside them, name -> sha256: configuration, tokenizer, licences; none of a manifest of the
            first format. The model card is not among them: it is for people to go on writing.
        tensors: What was computed; the other tensors are copies.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA

    format: str
    arithmetic: int
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
    tokenizer: str
    untied: bool
    sweep: list[str]
    shared: dict[Literal["files", "with"], list[str]] | None
    versions: dict[str, str]
    rounding_loss: list[RoundingLoss]
    files: dict[str, FileRecord]
    companions: dict[str, str]
    tensors: dict[str, TensorRecord]

    @property
    def is_old(self) -> bool:
        """Whether it is of a format before this version's."""
        return self.format in _OLD_FORMATS

    def to_json(self) -> str:
        """As it is written."""
        document = asdict(self)
        for record in document["files"].values():
            if record["sha256"] is None:  # nobody asked for it
                del record["sha256"]
        return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def read_manifest(directory: Path) -> Manifest:
    """Read ``merge.json`` of a merged checkpoint.

    Raises:
        VerificationError: There is none, or it is not one of ours.
    """
    if not (directory / MANIFEST).is_file():
        several = [folder.name for folder in checkpoints_of_sweep(directory)]
        hint = f"; it is a sweep, name one of its checkpoints: {', '.join(several)}" if several else ""
        raise VerificationError(f"{directory}: has no {MANIFEST}, so mergekit-bio did not write it{hint}")
    try:
        file = inside(directory, MANIFEST)
    except CheckpointError as error:
        raise VerificationError(str(error)) from error
    return read_manifest_file(file)


def read_manifest_file(file: Path) -> Manifest:
    """Read a ``merge.json``, whatever it is called and wherever it is.

    Raises:
        VerificationError: It is not one of ours.
    """
    document = read_json(file, error=VerificationError)
    if (found := document.get("format")) in _OLD_FORMATS:
        document = _OLD_FORMATS[found] | document
    elif found != FORMAT:
        raise VerificationError(f"{file}: format {found!r} is not {FORMAT!r}, this version's; merge again")
    return Document(file, document, VerificationError).checked(Manifest)


def checkpoints_of_sweep(directory: Path) -> list[Path]:
    """The checkpoints in a sweep's directory, not what a killed merge left; none where it is a checkpoint itself."""
    if (directory / MANIFEST).exists():
        return []
    return sorted(path.parent for path in directory.glob(f"[!.]*/{MANIFEST}"))


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
    ours = {directory / name for name in (MANIFEST, CARD, *manifest.files, *manifest.companions)}
    folders = {folder for file in ours for folder in file.parents}
    present = sorted(path for path in directory.rglob("*") if path not in folders)
    return next((path.relative_to(directory).as_posix() for path in present if path not in ours), None)


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
