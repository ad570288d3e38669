"""``merge.json``: where a merged checkpoint came from and how to check it."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from mergekit_bio.checkpoint.directory import inside
from mergekit_bio.checkpoint.header import StoredTensor
from mergekit_bio.errors import CheckpointError, MergekitBioError, OutputError, VerificationError
from mergekit_bio.outside_data import Document, read_json

MANIFEST = "merge.json"
CARD = "README.md"
FORMAT = "mergekit-bio/merge@2"
#: Of before the files beside the weights were recorded; otherwise the same. It is read, and not written any more.
_FIRST_FORMAT = "mergekit-bio/merge@1"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Origin(_Strict):
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


class BaseOrigin(Origin):
    """The base."""

    model_type: str | None


class Strength(_Strict):
    """One adapter's alpha: a default and exceptions by module or layer range."""

    default: float
    modules: dict[str, float]


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
    base_weights: dict[str, str] = {}


class SharedFiles(_Strict):
    """Files that are hard links shared with other directories of a sweep."""

    files: list[str]
    with_: list[str]

    model_config = ConfigDict(
        extra="forbid", frozen=True, alias_generator=lambda name: name.rstrip("_"), populate_by_name=True
    )


class FileRecord(_Strict):
    """A shard: its size, and the sha256 of its header."""

    bytes: int
    header_sha256: str


class TensorRecord(_Strict):
    """A tensor that was computed: sha256 of its bytes as written."""

    sha256: str


class LossRecord(_Strict):
    """:class:`mergekit_bio.merging.rounding_loss.RoundingLoss`."""

    modules: str
    tensors: int
    elements: int
    delta_over_weight: float
    loss: float
    bias: float
    loss_nearest: float
    bias_nearest: float


class Manifest(_Strict):
    """The whole of ``merge.json``.

    Attributes:
        files: The shards.
        companions: The files beside them, name -> sha256: configuration, tokenizer, licences; none of a manifest of the
            first format. The model card is not among them: it is for people to go on writing.
        tensors: What was computed; the other tensors are copies.
    """

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
    shared: SharedFiles | None
    versions: dict[str, str]
    rounding_loss: list[LossRecord]
    files: dict[str, FileRecord]
    companions: dict[str, str]
    tensors: dict[str, TensorRecord]

    def to_json(self) -> str:
        """As it is written."""
        return json.dumps(self.model_dump(by_alias=True), indent=2, ensure_ascii=False) + "\n"

    def document(self) -> dict[str, Any]:
        """As plain values, as a reader of the file has them."""
        return self.model_dump(by_alias=True)


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
