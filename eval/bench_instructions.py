"""What a real model keeps of instructions as an adapter is merged in: ``recipes/instructions.yaml``, SmolLM2-135M.

    python eval/bench_instructions.py FOLDER

The adapter is a LoRA trained on Python's language reference (see ``smollm2.py``), in NatureLM-audio's layout, with ears
made from random numbers: audio is a prefix that means nothing to it. Goes on where it was stopped; writes
eval/results/instructions.md at its end.
"""

import argparse
import json
import shutil
from pathlib import Path

import smollm2
from bench_beams import TEMPLATE
from machine import describe
from safetensors.torch import load_file, save_file
from tiny_naturelm import make_naturelm

import mergekit_bio
from mergekit_bio.eval.report.build import Sweep
from mergekit_bio.eval.report.tables import constraint_table
from mergekit_bio.eval.run.evaluate import evaluate
from mergekit_bio.eval.run.progress import SilentListener
from mergekit_bio.eval.scoring.following import RULES

TRAINING = smollm2.Training("instructions", steps=30, tokens=64, learning_rate=2e-3)
ALPHAS = (0.0, 0.5, 1.0)
PAGE = Path(__file__).with_name("results") / "instructions.md"


class Said(SilentListener):
    """Says how far a run is."""

    def note(self, text: str) -> None:
        print(text, flush=True)

    def standing(self, standing) -> None:
        print(f"{standing.cell}: {standing.run_done} of {standing.run_rows}", flush=True)


def merged(folder: Path) -> Path:
    """The sweep, with ears."""
    sweep = folder / "sweep"
    if sweep.exists():
        return sweep
    for made in (folder / "base", folder / "naturelm"):
        shutil.rmtree(made, ignore_errors=True)
    # 1. A token that the base does not use stands for the audios.
    base = shutil.copytree(smollm2.base(), folder / "base")
    for file in (base / "tokenizer.json", base / "tokenizer_config.json"):
        file.write_text(file.read_text().replace("<jupyter_script>", "<|reserved_special_token_0|>"))
    # 2. The trained LoRA takes the place of the random one.
    naturelm = make_naturelm(folder / "naturelm", llama=base)
    trained = load_file(smollm2.adapter(TRAINING) / "adapter_model.safetensors")
    tensors = {
        name: tensor for name, tensor in load_file(naturelm / "model.safetensors").items() if ".lora_" not in name
    }
    for name, tensor in trained.items():
        tensors[f"llama_model.{name.removesuffix('.weight')}.default.weight"] = tensor
    save_file(tensors, naturelm / "model.safetensors")
    config = json.loads((naturelm / "config.json").read_text())
    config |= {"prompt_template": TEMPLATE, "lora_rank": smollm2.RANK, "lora_alpha": smollm2.RANK}
    (naturelm / "config.json").write_text(json.dumps(config))
    mergekit_bio.merge(base=base, adapter=naturelm, alphas=ALPHAS, out=sweep)
    return sweep


def page(sweep: Sweep, folder: Path) -> str:
    rows = []
    for item in sweep.scores:
        texts = []
        for rule in RULES:
            low, high = item.intervals[rule]
            texts.append(f"{item.metrics[rule]:.3f} [{low:.3f}, {high:.3f}]")
        rows.append(f"| {item.cell.alpha:g} | {' | '.join(texts)} |")
    kinds = []
    for rule in RULES:
        header, groups = constraint_table(sweep, rule)
        kinds += [
            f"## Kept, {rule}, by constraint",
            "",
            f"| {' | '.join(header)} |",
            "| --- |" + " ---: |" * (len(header) - 1),
        ]
        kinds += [f"| `{group[0]}` | {' | '.join(group[1:])} |" for group in groups] + [""]
    return f"""# What SmolLM2-135M-Instruct keeps of instructions

`recipes/instructions.yaml`, 200 prompts (instructions-v1), asked of SmolLM2-135M-Instruct with a LoRA of rank
{smollm2.RANK} merged in that was trained for {TRAINING.steps} steps on Python's language reference, plain text and no
dialogue. Its ears are made from random numbers: audio is a prefix that means nothing to it. 95% intervals, bootstrap
over prompts. Made by `eval/bench_instructions.py` ({describe(folder)}).

| alpha | kept, strict | kept, loose |
| ---: | ---: | ---: |
{chr(10).join(rows)}

{chr(10).join(kinds).rstrip()}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="for the model and the run")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    run = evaluate(
        recipe="instructions",
        out=folder / "run",
        models=[merged(folder) / f"alpha-{alpha:.2f}" for alpha in ALPHAS],
        engine="vllm",
        engine_options={"dtype": "float32", "enforce_eager": True, "max_model_len": 1024},
        listener=Said(),
    )
    (sweep,) = run.report().sweeps
    PAGE.write_text(page(sweep, folder))


if __name__ == "__main__":
    main()
