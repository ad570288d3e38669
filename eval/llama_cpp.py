"""What ``merge`` writes goes through llama.cpp's own converter to GGUF without a changed weight.

Takes the converter out of the source package of llama-cpp-python on PyPI (some 80 MB), merges adapters for
SmolLM2-135M-Instruct, converts the merges, and lets Transformers read both sides. Writes eval/results/llama_cpp.md.
"""

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import smollm2
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import mergekit_bio

PACKAGE = "llama-cpp-python==0.3.36"
RESULTS = Path(__file__).resolve().parent / "results" / "llama_cpp.md"
#: What an adapter changes beside a LoRA on q, as settings of PEFT's, and tokens that it adds.
ADAPTERS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "LoRA; the head is the embedding": ({}, []),
    "a head of its own": ({"modules_to_save": ["lm_head"]}, []),
    "two new tokens": ({"modules_to_save": ["embed_tokens", "lm_head"]}, ["<owl>", "<wren>"]),
}


def fetch_converter(folder: Path) -> Path:
    """The sources of llama.cpp that the package carries."""
    options = ["--quiet", "--no-deps", "--no-binary", ":all:", "--dest", folder]
    subprocess.run([sys.executable, "-m", "pip", "download", *options, PACKAGE], check=True)
    (package,) = folder.glob("*.tar.gz")
    with tarfile.open(package) as archive:
        archive.extractall(folder, filter="data")
    return next(folder.glob("*/vendor/llama.cpp"))


def write_adapter(folder: Path, settings: dict[str, Any], tokens: list[str]) -> None:
    """An adapter as PEFT saves it, with random changes everywhere."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(smollm2.base(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(smollm2.base())
    if tokens:
        tokenizer.add_tokens(tokens)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    adapted = get_peft_model(model, LoraConfig(r=8, task_type="CAUSAL_LM", target_modules=["q_proj"], **settings))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    adapted.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def largest_difference(checkpoint: Path, gguf: Path) -> float:
    """Between the two sides' logits in float32."""
    sides = [
        AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32),
        AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32),
    ]
    ids = torch.randint(sides[0].config.vocab_size, (1, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = (side(ids).logits for side in sides)
    return float((ours - theirs).abs().max())


def main() -> None:
    """Run it."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        sources = fetch_converter(Path(scratch))
        for number, (what, (settings, tokens)) in enumerate(ADAPTERS.items()):
            adapter, gguf = Path(scratch) / f"adapter-{number}", Path(scratch) / f"{number}.gguf"
            write_adapter(adapter, settings, tokens)
            (merged,) = mergekit_bio.merge(
                base=smollm2.base(), adapter=adapter, alphas=[0.5], out=Path(scratch) / f"merged-{number}", device="cpu"
            )
            command = [sys.executable, sources / "convert_hf_to_gguf.py", merged.path, "--outtype", "f32"]
            environment = os.environ | {"PYTHONPATH": str(sources / "gguf-py")}
            subprocess.run([*command, "--outfile", gguf], env=environment, check=True)
            rows.append(f"| {what} | {largest_difference(merged.path, gguf):g} |")
            print(rows[-1], flush=True)
    RESULTS.write_text(
        f"""# Through llama.cpp's converter

`convert_hf_to_gguf.py --outtype f32` of the llama.cpp in {PACKAGE}, on merges of adapters for
SmolLM2-135M-Instruct at alpha 0.5; Transformers then reads the checkpoint and the GGUF file, and computes the logits of
64 random tokens in float32. Made by `python eval/llama_cpp.py`.

| the adapter has | largest difference of a logit |
|---|---:|
"""
        + "\n".join(rows)
        + "\n"
    )


if __name__ == "__main__":
    main()
