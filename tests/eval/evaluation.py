"""What a small evaluation needs: a base and an adapter of random numbers, a folder of tones, a recipe."""

import csv
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import soundfile
import yaml
from tiny_naturelm import make_base, make_naturelm

from mergekit_bio.eval.components import components
from mergekit_bio.eval.recipe.schema import load_recipe

SPECIES = ("Coruro", "Minke Whale", "Spotted Elachura")
CLIPS = 9
RATE = 8000
QUERIES = [
    "Which species is it?{randomize}\nOutput exactly one of: {species_list}",
    "Here are examples.\n\n{audio_examples}\n\nNow name the species in <Audio><AudioHere></Audio>",
]


@dataclass(frozen=True)
class Evaluation:
    """A recipe's file and what it is about."""

    recipe: Path
    base: Path
    adapter: Path
    recordings: Path

    def variant(self, name: str, **changes) -> Path:
        """A copy of the recipe with other keys; None takes a key away."""
        data = yaml.safe_load(self.recipe.read_text()) | changes
        file = self.recipe.with_name(f"{name}.yaml")
        file.write_text(yaml.safe_dump({"name": "tones"} | {k: v for k, v in data.items() if v is not None}))
        return file


def write_recordings(folder: Path) -> Path:
    """Tones of one second, the last one of a fifth; every recording another."""
    folder.mkdir()
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "label"])
        for number in range(CLIPS):
            seconds = 0.2 if number == CLIPS - 1 else 1.0
            tone = 0.5 * np.sin(np.arange(round(RATE * seconds)) * (0.1 + 0.2 * number))
            soundfile.write(folder / f"{number}.wav", tone, RATE)
            writer.writerow([f"{number}.wav", SPECIES[number % 3]])
    return folder


def write_evaluation(folder: Path, base: Path | None = None, adapter: Path | None = None) -> Evaluation:
    """Everything in one folder; base and adapter are made up where they are not given."""
    base = base or make_base(folder / "base")
    adapter = adapter or make_naturelm(folder / "adapter", base=base)
    recordings = write_recordings(folder / "recordings")
    recipe = folder / "tones.yaml"
    data = {
        "merge": {"base": str(base), "adapter": str(adapter), "alphas": [0.0, 1.0]},
        "datasets": [{"path": str(recordings)}],
        "top_k_species": 10,
        "n_examples": 1,
        "queries": QUERIES,
        "generate": {"max_new_tokens": 6, "num_beams": 1},
        "scorer": "exact",
    }
    recipe.write_text(yaml.safe_dump(data))
    return Evaluation(recipe, base, adapter, recordings)


def shipped_copy(file: Path, folder: Path, checkpoint: Path) -> Path:
    """A recipe that comes with the package, about made-up clips in BEANS-Zero's schema and one small checkpoint."""
    recipe = load_recipe(file).recipe
    rows = []
    for choice in (choice for choice in recipe.datasets if choice.path is None):
        known = (components()[choice.name].labels or ("A wren sings.",))[:3]
        labels = [one.name for one in recipe.species] or [label for label in known if label != "None"]
        for label in labels * (recipe.n_examples + 1):
            rows.append(
                {
                    "id": str(len(rows)),
                    "dataset_name": choice.name,
                    "audio": (0.5 * np.sin(np.arange(RATE) * (0.1 + 0.01 * len(rows)))).tolist(),
                    "metadata": json.dumps({"sample_rate": RATE}),
                    "instruction": "<Audio><AudioHere></Audio> What is it?",
                    "output": label,
                }
            )
    data = folder / "beans_zero.parquet"
    if rows:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), data)
    content = yaml.safe_load(file.read_text()) | {"data": str(data), "checkpoints": [str(checkpoint)]}
    for choice in content["datasets"]:
        if isinstance(choice, dict):
            choice["path"] = str(file.parent / choice["path"])
    del content["merge"]
    content["generate"]["max_new_tokens"] = 3
    if "label_map" in content:
        content["label_map"] = str(file.parent / content["label_map"])
    copy = folder / file.name
    copy.write_text(yaml.safe_dump(content))
    return copy
