"""Clips a second of the audio prefix at full size, beside a plain eager implementation of the same.

Random weights, 12 layers, clips of 10 s. Every case runs in a process of its own, the two implementations in turn; the
machine's own matrix-product rate is measured in the same process, right before and after. Writes the medians to
eval/results/prefix.md.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import machine

HERE = Path(__file__).resolve().parent
CLIP = 160_000
TYPES = ("float32", "bfloat16")

#: NatureLM-audio's config.json, as far as the tower goes.
NATURELM = {
    "beats_cfg": {
        "activation_fn": "gelu",
        "conv_bias": False,
        "conv_pos": 128,
        "conv_pos_groups": 16,
        "deep_norm": True,
        "embed_dim": 512,
        "encoder_attention_heads": 12,
        "encoder_embed_dim": 768,
        "encoder_ffn_embed_dim": 3072,
        "encoder_layers": 12,
        "finetuned_model": True,
        "gru_rel_pos": True,
        "input_patch_size": 16,
        "layer_norm_first": False,
        "max_distance": 800,
        "num_buckets": 320,
        "predictor_class": 527,
        "relative_position_embedding": True,
    },
    "max_pooling": False,
    "num_audio_query_token": 1,
    "second_per_window": 0.333333,
    "second_stride": 0.333333,
    "use_audio_Qformer": True,
    "window_level_Qformer": True,
}


@dataclass(frozen=True)
class Case:
    """One thing to time.

    Attributes:
        device: ``"cpu"`` or ``"cuda"``.
        dtype: Of the parameters.
        batch: Clips at once.
        eager: The plain implementation instead of ours.
    """

    device: str
    dtype: str
    batch: int
    eager: bool


@dataclass(frozen=True)
class Timing:
    """What one process measured.

    Attributes:
        clips: A second, median of the repeats.
        matmul: FLOP a second of a large square matrix product of the same type, the better of before and after.
        memory: Bytes by which the peak grew while clips were embedded.
        difference: Largest difference between the implementations' prefixes, relative to the largest element.
    """

    clips: float
    matmul: float
    memory: int
    difference: float


def eager_prefix(prefix, features):
    """The tower written straight from the papers: whole-batch scores, a softmax, nothing fused or reused."""
    import torch
    from torch.nn import functional as F

    from mergekit_bio.audio.beats import relative_buckets

    beats, encoder, config = prefix.beats, prefix.beats.encoder, prefix.config
    patches = beats.patch_embedding(features.to(prefix.audio_query_tokens.dtype)[:, None]).flatten(2).transpose(1, 2)
    x = beats.post_extract_proj(beats.layer_norm(patches))
    conv = encoder.pos_conv[0]
    weight = conv.weight_g * conv.weight_v / conv.weight_v.norm(dim=(0, 1), keepdim=True)
    convolved = F.conv1d(x.transpose(1, 2), weight, conv.bias, padding=64, groups=config.beats.conv_groups)
    x = encoder.layer_norm(x + F.gelu(convolved[..., :-1]).transpose(1, 2))
    batch, tokens, width = x.shape
    heads, layers = config.beats.num_attention_heads, config.beats.num_hidden_layers
    scale, residual = (width // heads) ** -0.5, (2 * layers) ** 0.25
    for layer in encoder.layers:
        attention = layer.self_attn
        q, k, v = (
            projection(x).view(batch, tokens, heads, -1).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        position = torch.arange(tokens, device=x.device)
        buckets = relative_buckets(
            position[None] - position[:, None],
            num_buckets=config.beats.num_buckets,
            max_distance=config.beats.max_distance,
        )
        bias = encoder.layers[0].self_attn.relative_attention_bias(buckets).permute(2, 0, 1)
        gates = attention.grep_linear(q).view(batch, heads, tokens, 2, 4).sum(-1).sigmoid()
        gate = gates[..., :1] * (gates[..., 1:] * attention.grep_a - 1) + 2
        attended = torch.softmax((q * scale) @ k.transpose(2, 3) + gate * bias, dim=-1) @ v
        attended = attention.out_proj(attended.transpose(1, 2).reshape(batch, tokens, width))
        x = layer.self_attn_layer_norm(x * residual + attended)
        x = layer.final_layer_norm(x * residual + layer.fc2(F.gelu(layer.fc1(x))))
    x = prefix.ln_audio(x)
    windows = x.unfold(1, config.window, config.stride).transpose(2, 3).flatten(0, 1)
    q = prefix.audio_Qformer.bert.embeddings.LayerNorm(prefix.audio_query_tokens.expand(len(windows), -1, -1))
    for layer in prefix.audio_Qformer.bert.encoder.layer:
        for part, context in ((layer.attention, None), (layer.crossattention, windows)):
            context = q if context is None else context
            query, key, value = (
                projection(source).unflatten(-1, (heads, -1)).transpose(1, 2)
                for projection, source in (
                    (part.self.query, q),
                    (part.self.key, context),
                    (part.self.value, context),
                )
            )
            read = torch.softmax(query @ key.transpose(2, 3) * scale, dim=-1) @ value
            q = part.output.LayerNorm(part.output.dense(read.transpose(1, 2).flatten(2)) + q)
        inner = layer.output_query.dense(F.gelu(layer.intermediate_query.dense(q)))
        q = layer.output_query.LayerNorm(inner + q)
    return prefix.audio_llama_proj(q.view(batch, -1, q.shape[-1]))


def flops_per_clip() -> float:
    """Multiplications and additions of one clip's matrix products and convolutions, by the formulas."""
    tokens, width, inner, layers = 496, 768, 3072, 12
    patches = tokens * (16 * 16 * 512 + 512 * width)
    convolution = tokens * width * (width // 16) * 128
    encoder = layers * tokens * (4 * width * width + 2 * width * inner + 2 * tokens * width)
    windows, window = 29, 17
    qformer = 2 * windows * (2 * window * width * width + 6 * width * width + 2 * width * inner)
    return 2.0 * (patches + convolution + encoder + qformer + windows * width * 4096)


def peak_memory(device: str) -> int:
    """Most bytes that this process has held so far."""
    import torch

    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run(case: Case, repeats: int) -> Timing:
    """Time one case in this process."""
    import torch

    from mergekit_bio.audio.config import AudioPrefixConfig
    from mergekit_bio.audio.prefix import AudioPrefix

    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    prefix = AudioPrefix(AudioPrefixConfig.from_naturelm(NATURELM, hidden_size=4096))
    torch.nn.init.normal_(prefix.audio_query_tokens)
    prefix = prefix.eval().to(case.device, dtype)
    waveform = (torch.rand(case.batch, CLIP) - 0.5).to(case.device)

    def embed(eager: bool, some):
        return eager_prefix(prefix, prefix.features(some)) if eager else prefix(some)

    def seconds(work) -> float:
        if case.device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if case.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    side = 4096 if case.device == "cpu" else 16_384
    square = torch.randn(side, side, device=case.device).to(dtype)

    def matmul() -> float:
        return 2 * side**3 / min(seconds(lambda: square @ square) for _ in range(3))

    with torch.inference_mode():
        matmul()
        before = matmul()
        held = peak_memory(case.device)
        embed(case.eager, waveform)
        timings = [seconds(lambda: embed(case.eager, waveform)) for _ in range(repeats)]
        memory = peak_memory(case.device) - held
        after = matmul()
        one, other = (embed(eager, waveform[:1]).float() for eager in (False, True))
    return Timing(
        clips=case.batch / statistics.median(timings),
        matmul=max(before, after),
        memory=memory,
        difference=float((one - other).abs().max() / other.abs().max()),
    )


def report(timings: dict[Case, list[Timing]], scratch: Path) -> str:
    """The results as Markdown."""
    import torch

    lines = [
        "# The audio prefix: clips of 10 s a second",
        "",
        f"{machine.describe(scratch)}; torch {torch.__version__}, {torch.get_num_threads()} threads.",
        f"From waveform to prefix, random weights at full size, {flops_per_clip() / 1e9:.0f} GFLOP a clip; medians.",
        "",
        "| device | type | batch | implementation | clips/s | of matmul rate | memory, MB | difference |",
        "|---|---|---:|---|---:|---:|---:|---:|",
    ]
    for case, several in timings.items():
        clips, share, memory, difference = (
            statistics.median(values)
            for values in zip(
                *((t.clips, t.clips * flops_per_clip() / t.matmul, t.memory, t.difference) for t in several),
                strict=True,
            )
        )
        lines.append(
            f"| {case.device} | {case.dtype} | {case.batch} | {'plain eager' if case.eager else 'mergekit-bio'} "
            f"| {clips:.2f} | {share:.0%} | {memory / 1e6:.0f} | {difference:.1e} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run every case, every round, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="processes for each case")
    parser.add_argument("--repeats", type=int, default=3, help="timings in each process")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--types", nargs="+", choices=TYPES, default=TYPES)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "prefix.md")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(asdict(run(Case(**json.loads(arguments.case)), arguments.repeats))))
        return

    import torch

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    timings: dict[Case, list[Timing]] = {
        Case(device, dtype, batch, eager): []
        for device in devices
        for dtype in arguments.types
        for batch in arguments.batches
        for eager in (True, False)
    }
    for number in range(arguments.rounds):
        for case, several in timings.items():
            command = [
                sys.executable,
                __file__,
                "--case",
                json.dumps(asdict(case)),
                "--repeats",
                str(arguments.repeats),
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stderr)
            several.append(Timing(**json.loads(done.stdout)))
            print(f"round {number + 1}: {case} {several[-1]}", file=sys.stderr, flush=True)
    text = report(timings, Path(tempfile.gettempdir()))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
