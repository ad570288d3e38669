"""Data in the schema of BEANS-Zero, made up."""

import json
from collections.abc import Callable
from pathlib import Path

import hypothesis
import numpy as np
import pytest

# A first example may import a library; that is not the time of the code under test.
hypothesis.settings.register_profile("eval", hypothesis.settings(), deadline=None)
hypothesis.settings.load_profile("eval")

COMPONENTS = {
    "unseen-family-cmn": ["Spotted Elachura"] * 5 + ["Dall's Porpoise"] * 4 + ["Coruro"] * 2,
    "watkins": ["Walrus", "Fin, Finback Whale", "Walrus"],
    "hiceas": ["Minke whale", "None"],
    "dcase": ["American Redstart, Jackdaw call", "Jackdaw call"],
    "captioning": ["A wren sings."],
}
RATE = 8000


def beans_zero_rows(components: dict[str, list[str]]) -> list[dict]:
    """Rows with the columns of EarthSpeciesProject/BEANS-Zero; the recording tells the row."""
    rows = []
    for name, labels in components.items():
        for number, label in enumerate(labels):
            seconds = 12 if number == 0 else 1
            question = f"What is it, {name}?"
            rows.append(
                {
                    "id": f"{name}-{number}",
                    "dataset_name": name,
                    "source_dataset": "made up",
                    "task": "classification",
                    "audio": np.sin(np.arange(RATE * seconds) / (3 + number)).tolist(),
                    "metadata": json.dumps({"sample_rate": RATE}),
                    "instruction": f"<Audio><AudioHere></Audio> {question}",
                    "instruction_text": question,
                    "output": label,
                    "license": "CC0",
                    "file_name": f"{number}.wav",
                }
            )
    return rows


@pytest.fixture(scope="session")
def beans_zero(tmp_path_factory) -> Callable[[str], Path]:
    """A small BEANS-Zero on this disk: as "parquet", "arrow" or "saved" (``save_to_disk``)."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            import datasets
            import pyarrow.parquet

            table = datasets.Dataset.from_list(beans_zero_rows(COMPONENTS))
            made[kind] = folder = tmp_path_factory.mktemp("beans-zero") / kind
            if kind == "parquet":
                folder.mkdir()
                pyarrow.parquet.write_table(table.data.table, folder / "shard-0.parquet", row_group_size=3)
            elif kind == "arrow":
                folder.mkdir()
                with datasets.arrow_writer.ArrowWriter(
                    path=str(folder / "data.arrow"), features=table.features
                ) as writer:
                    writer.write_table(table.data.table)
            else:
                table.save_to_disk(folder, num_shards=2)
        return made[kind]

    return make


@pytest.fixture(autouse=True, scope="session")
def own_datasets_cache(tmp_path_factory):
    """The ``datasets`` cache of the tests, apart from the user's."""
    import datasets

    patch = pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf"))
    yield
    patch.undo()
