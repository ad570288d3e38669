"""A Hugging Face cache on this disk, laid out as ``huggingface_hub`` leaves it after a download."""

import hashlib
import shutil
from pathlib import Path

BASE, BASE_REVISION = "meta-llama/Llama-3.1-8B-Instruct", "0e9e39f249a16976918f6564b8830bc894c89659"
ADAPTER, ADAPTER_REVISION = "EarthSpeciesProject/NatureLM-audio", "77855d9b0acd039f90798dcf0861f626bfefbd6f"


def put_in_cache(cache: Path, repo_id: str, revision: str, source: Path) -> Path:
    """Make ``source`` what the cache holds of ``repo_id``: blobs, and a snapshot of links to them.

    Returns:
        The snapshot.
    """
    home = cache / f"models--{repo_id.replace('/', '--')}"
    snapshot = home / "snapshots" / revision
    for folder in (home / "blobs", home / "refs", snapshot):
        folder.mkdir(parents=True)
    (home / "refs" / "main").write_text(revision)
    for file in source.iterdir():
        blob = home / "blobs" / hashlib.sha256(file.name.encode()).hexdigest()
        shutil.copyfile(file, blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot
