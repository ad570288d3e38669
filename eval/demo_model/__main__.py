"""Train the demo's model from nothing: ``make demo-model``, ten minutes on one core."""

import argparse
from pathlib import Path

import torch
from demo_model.base import Batcher, train_base
from demo_model.curve import print_curve
from demo_model.ears import PREFIX_LENGTH, record, record_nobody, train_lora, train_tower, write_adapter
from transformers import AutoTokenizer, LlamaForCausalLM

from mergekit_bio.demo.species import HEARD, UNHEARD

BASE_STEPS, TOWER_STEPS, LORA_STEPS = 1000, 400, 350
#: Recordings of each heard species for the tower's lessons, and of each voice when nobody calls.
FOR_TOWER, OF_NOBODY = 40, 160
#: Recordings of each species for the LoRA's lessons; of heard and of unheard ones for the look at the end.
FOR_LORA, LOOK_HEARD, LOOK_UNHEARD = 24, 6, 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="a new folder; gets base/ and adapter/")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    out, seed = arguments.out, arguments.seed
    torch.set_num_threads(1)  # sums in one order: the same model every time
    train_base(out / "base", steps=BASE_STEPS, seed=seed)
    lessons = record(HEARD, each=FOR_TOWER, seed=seed + 9)
    prefix = train_tower(lessons, record_nobody(each=OF_NOBODY, seed=seed + 8), steps=TOWER_STEPS, seed=seed)
    base = LlamaForCausalLM.from_pretrained(out / "base", dtype="float32")  # as bfloat16 has left it
    tokenizer = AutoTokenizer.from_pretrained(out / "base")
    batcher = Batcher(tokenizer, prefix_length=PREFIX_LENGTH)
    model = train_lora(base, batcher, prefix, record(HEARD, each=FOR_LORA, seed=seed + 10), steps=LORA_STEPS, seed=seed)
    write_adapter(out / "adapter", model, prefix)
    heard = record(HEARD, each=LOOK_HEARD, seed=seed + 11)
    unheard = record(UNHEARD, each=LOOK_UNHEARD, seed=seed + 12)
    print_curve(model, batcher, tokenizer, prefix, heard=heard, unheard=unheard)


if __name__ == "__main__":
    main()
