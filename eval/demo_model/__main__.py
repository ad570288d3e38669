"""Train the demo's model from nothing: ``make demo-model``, about a quarter of an hour on two cores."""

import argparse
from pathlib import Path

from demo_model.base import Batcher, train_base
from demo_model.curve import print_curve
from demo_model.ears import PREFIX_LENGTH, record, train_lora, train_tower, write_adapter
from transformers import AutoTokenizer, LlamaForCausalLM

from mergekit_bio.demo.species import HEARD, SPECIES, UNHEARD

BASE_STEPS, TOWER_STEPS, LORA_STEPS = 700, 450, 400
#: Recordings of each species: for the tower's lessons, the LoRA's, and the look at the end.
FOR_TOWER, FOR_LORA, FOR_LOOKING = 30, 40, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="a new folder; gets base/ and adapter/")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    out, seed = arguments.out, arguments.seed
    train_base(out / "base", steps=BASE_STEPS, seed=seed)
    prefix = train_tower(record(SPECIES, each=FOR_TOWER, seed=seed + 9), steps=TOWER_STEPS, seed=seed)
    base = LlamaForCausalLM.from_pretrained(out / "base", dtype="float32")  # as bfloat16 has left it
    tokenizer = AutoTokenizer.from_pretrained(out / "base")
    batcher = Batcher(tokenizer, prefix_length=PREFIX_LENGTH)
    model = train_lora(base, batcher, prefix, record(HEARD, each=FOR_LORA, seed=seed + 10), steps=LORA_STEPS, seed=seed)
    write_adapter(out / "adapter", model, prefix)
    heard, unheard = (record(species, each=FOR_LOOKING, seed=seed + 11) for species in (HEARD, UNHEARD))
    print_curve(model, batcher, tokenizer, prefix, heard=heard, unheard=unheard)


if __name__ == "__main__":
    main()
