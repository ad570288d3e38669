"""The model card of a merged checkpoint, written from what its ``merge.json`` says."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mergekit_bio.outside_data import to_yaml

_HUB = "https://huggingface.co"
_LLAMA_MODELS = "https://github.com/meta-llama/llama-models/blob/main/models"

#: Licences that say what a user of the merge has to do: name, text, terms in brief.
_LICENSES = {
    "cc-by-nc-sa-4.0": (
        "CC BY-NC-SA 4.0",
        "https://creativecommons.org/licenses/by-nc-sa/4.0/",
        "give credit, no commercial use, pass on under the same licence",
    ),
    "apache-2.0": ("Apache 2.0", "https://www.apache.org/licenses/LICENSE-2.0", "keep the notices"),
    "mit": ("MIT", "https://opensource.org/license/mit", "keep the copyright notice"),
}

#: Metadata of what can be loaded.
_OF_A_MODEL = ("library_name", "pipeline_tag")

_PAPERS = {
    "merging": """\
@inproceedings{marincione2025merging,
  title     = {Model Merging Improves Zero-Shot Generalization in Bioacoustic Foundation Models},
  author    = {Marincione, Davide and Crisostomi, Donato and Dessi, Roberto and Rodol{\\`a}, Emanuele
               and Rossi, Emanuele},
  booktitle = {NeurIPS Workshop on AI for Non-Human Animal Communication},
  year      = {2025},
  eprint    = {2511.05171},
  archivePrefix = {arXiv}
}""",
    "naturelm-audio": """\
@article{robinson2024naturelm,
  title   = {{NatureLM-audio}: an Audio-Language Foundation Model for Bioacoustics},
  author  = {Robinson, David and Miron, Marius and Hagiwara, Masato and Pietquin, Olivier},
  journal = {arXiv preprint arXiv:2411.07186},
  year    = {2024}
}""",
}


def model_card(manifest: Mapping[str, Any]) -> str:
    """The ``README.md`` of a merged directory.

    Args:
        manifest: The parsed ``merge.json``.

    Returns:
        Markdown with the hub's YAML metadata in front.
    """
    about = (
        "The audio encoder and its projection are in the directory too, unchanged: it hears without a second download."
        if manifest["audio_prefix"]
        else "The result is a plain checkpoint of the base's architecture: no adapter is needed to run it."
    )
    sections = (
        _introduction(manifest, about),
        _how_to_load(manifest),
        _provenance(manifest),
        _rounding_loss(manifest),
        _licences(manifest),
        _citation(manifest),
    )
    return _page(_metadata(manifest), sections)


def receipt_card(manifest: Mapping[str, Any], name: str) -> str:
    """The ``README.md`` of a repository that holds a receipt and no weights.

    Args:
        manifest: The parsed ``merge.json``.
        name: What the repository is called, with ``@BRANCH`` where it is not the main one.

    Returns:
        Markdown with the hub's YAML metadata in front.
    """
    folder = name.partition("/")[2].replace("@", "-")
    how = f"""\
## How to make it

This repository holds the receipt of a merge, `merge.json`, and none of its weights: those are the sources', under the
sources' terms. The same bytes are made from the sources, fetched at the revisions that were merged, and every hash is
compared:

```sh
mergekit-bio rebuild {name} --out {folder}
```"""
    metadata = {key: value for key, value in _metadata(manifest).items() if key not in _OF_A_MODEL}
    sections = (
        _introduction(manifest, "This is its receipt."),
        how,
        _provenance(manifest),
        _rounding_loss(manifest),
        _licences(manifest),
        _citation(manifest),
    )
    return _page(metadata, sections)


def sweep_card(manifests: Mapping[str, Mapping[str, Any]], repo_id: str) -> str:
    """The ``README.md`` of a repository that holds the checkpoints of a sweep, each on a branch.

    Args:
        manifests: Branch -> the parsed ``merge.json`` of what is there.
        repo_id: The repository.

    Returns:
        Markdown with the hub's YAML metadata in front.
    """
    first, branch = next(iter(manifests.values())), list(manifests)[-1]
    rows = [(f"[`{name}`]({_HUB}/{repo_id}/tree/{name})", manifest["alpha"]) for name, manifest in manifests.items()]
    how = f"""\
## The strengths

Each is a checkpoint of its own, on a branch of its own:

{_table(("Branch", "α"), rows)}

A loader is told which as the revision, such as `revision="{branch}"` in Transformers or `--revision {branch}` in vLLM;
to mergekit-bio it is `{repo_id}@{branch}`."""
    introduction = _introduction(first, "This is a sweep over α.", strengths=False)
    # The same weights may have been found in several places, which state several licences: all of them apply.
    sources: list[Mapping[str, Any]] = []
    for source in (source for manifest in manifests.values() for source in _sources(manifest)):
        if not any(all(source[key] == other[key] for key in ("name", "id", "license")) for other in sources):
            sources.append(source)
    return _page(_metadata(first, sources), (introduction, how, _licences(first, sources), _citation(first)))


def _page(metadata: Mapping[str, Any], sections: Iterable[str]) -> str:
    body = "\n\n".join(section for section in sections if section)
    return f"---\n{to_yaml(metadata)}---\n\n{body}\n"


def _metadata(manifest: Mapping[str, Any], sources: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    audio = manifest["audio_prefix"]
    kinds = {adapter["peft_type"] or adapter["kind"] for adapter in manifest["adapters"]}
    sources = sources or _sources(manifest)
    parents = list(dict.fromkeys(source["id"] for source in sources if source["id"]))
    tags = ["merge", "mergekit-bio"]
    tags += ["lora"] if kinds & {"LORA", "naturelm-audio"} else []
    tags += ["bioacoustics"] if "naturelm-audio" in kinds else []
    tags += ["audio"] if audio else []
    data: dict[str, Any] = {"base_model": parents, "base_model_relation": "merge"} if parents else {}
    data["library_name"] = "transformers"
    data["pipeline_tag"] = "audio-text-to-text" if audio else "text-generation"
    data["tags"] = tags
    licensed = {stated: source for source in sources if (stated := _license_id(source))}
    match list(licensed):
        case [only] if only != "other" and ", " not in only:
            data["license"] = only
        case [*_, last]:
            # The hub has no identifier for a combination. The adapter's licence is the one that narrows the base's.
            data["license"] = "other"
            data["license_name"] = "-and-".join(licensed).replace(", ", "-and-")
            data["license_link"] = _license(licensed[last])[1]
    return data


def _introduction(manifest: Mapping[str, Any], about: str, *, strengths: bool = True) -> str:
    base, adapters = manifest["base"], manifest["adapters"]
    name, llama = base["name"], _llama_version(base)
    if llama and not name.startswith("Llama"):
        # The community licence: a derivative's name begins with "Llama".
        name = name.removeprefix("Meta-") if name.startswith("Meta-Llama") else f"Llama {llama} {name}"
    title = " + ".join([name, *(_scaled(adapter) if strengths else adapter["name"] for adapter in adapters)])
    deltas = ", ".join(_link(adapter) for adapter in adapters)
    notice = f"**Built with {'Meta Llama 3' if llama == '3' else 'Llama'}**\n\n" if llama else ""
    return f"""\
# {_plain(title)}

{notice}{_link(base)} with the weight deltas of {deltas} folded in at a chosen strength α: W(α) = W₀ + α·ΔW.
Made by mergekit-bio. {about}"""


def _how_to_load(manifest: Mapping[str, Any]) -> str:
    path_line = 'path = "."  # this directory, or its id on the hub'
    if manifest["audio_prefix"]:
        return f"""\
## How to load it

Transformers, with audio (`pip install 'mergekit-bio[eval]'`):

```python
import mergekit_bio.model  # makes the model's classes known to Transformers
from transformers import AutoModelForMultimodalLM, AutoProcessor

{path_line}
processor = AutoProcessor.from_pretrained(path)
model = AutoModelForMultimodalLM.from_pretrained(path, dtype="auto")
```

From the shell: one answer, or an OpenAI-compatible server on vLLM (`pip install 'mergekit-bio[vllm]'`, which makes
the model known to a plain `vllm serve` as well):

```sh
mergekit-bio ask . recording.wav --prompt "What is the common name for the focal species in the audio?"
mergekit-bio serve .
```

For text only, llama.cpp's converter takes this directory and leaves the audio encoder out; for other loaders of a plain
Llama (lm-evaluation-harness, mergekit, `AutoModelForCausalLM` alone) merge again with `--text-only`."""
    return f"""\
## How to load it

Transformers:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

{path_line}
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
```

vLLM, and llama.cpp after conversion:

```sh
vllm serve .
python convert_hf_to_gguf.py . --outfile model.gguf
```"""


def _provenance(manifest: Mapping[str, Any]) -> str:
    base, rounding = manifest["base"], manifest["rounding"]
    versions = {"mergekit-bio": manifest["version"]} | manifest["versions"]
    rows = [("Base", f"{_link(base)}{_at(base)}"), ("Base, fingerprint", f"`{base['fingerprint']}`")]
    for adapter in manifest["adapters"]:
        alpha = adapter["alpha"]
        strengths = [_number(alpha["default"])]
        strengths += [f"{_strength(value)} on `{module}`" for module, value in alpha["modules"].items()]
        kind, scaling = adapter["peft_type"] or adapter["kind"], ", ".join(adapter["scaling"])
        rows += [
            ("Adapter", f"{_link(adapter)}{_at(adapter)}"),
            ("Adapter, fingerprint", f"`{adapter['fingerprint']}`"),
            ("Deltas", f"{adapter['deltas']} tensors ({kind}{f', scaling {scaling}' if scaling else ''})"),
            ("α", ", ".join(strengths)),
        ]
        if adapter.get("base_weights"):
            names = ", ".join(f"`{_plain(name)}`" for name in list(adapter["base_weights"])[:3])
            more = f" and {len(adapter['base_weights']) - 3} more" if len(adapter["base_weights"]) > 3 else ""
            rows.append(("Not the base's own", f"{names}{more}: the adapter's, at every α (--base-from-adapter)"))
    if manifest["untied"]:
        rows.append(("Embeddings", "untied from the output layer, as the deltas of the two differ"))
    rows += [
        ("Data type", "as in the base" if manifest["dtype"] == "keep" else manifest["dtype"]),
        ("Rounding", f"{rounding}, seed {manifest['seed']}" if rounding == "stochastic" else rounding),
        ("Made", f"{manifest['created']} on {manifest['device']}"),
        ("With", ", ".join(f"{name} {version}" for name, version in versions.items())),
    ]
    shared = manifest["shared"]
    note = ""
    if shared:
        files = ", ".join(f"`{name}`" for name in shared["files"])
        note = (
            f"\n\nThis is one strength of a sweep. {files}: no delta touches these tensors, so on the disk where they "
            f"were made these files are hard links shared with {', '.join(shared['with'])}, and read-only. Copying or "
            "uploading them is safe; changing them in place would change every strength."
        )
    return f"""\
## Where it comes from

{_table(("", ""), rows)}

```sh
{manifest["command"]}
```

A fingerprint is the sha256 over each tensor's name, type, shape and both ends. `merge.json` has the sha256 of every
tensor that was computed: `mergekit-bio verify .` checks them, and computes them anew with `--against-sources`.{note}"""


def _rounding_loss(manifest: Mapping[str, Any]) -> str:
    losses = manifest["rounding_loss"]
    if not losses:
        return ""
    nearest_only = manifest["rounding"] == "nearest"
    columns = [("loss, nearest", "loss_nearest"), ("bias, nearest", "bias_nearest")]
    if not nearest_only:
        columns = [(f"loss, {manifest['rounding']}", "loss"), (f"bias, {manifest['rounding']}", "bias"), *columns]
    heads = ("Modules", "Tensors", "Weights", "‖ΔW‖ / ‖W‖", *(head for head, _ in columns))
    rows = [
        (
            "**total**" if row["modules"] == "total" else f"`{row['modules']}`",
            f"{row['tensors']:,}",
            f"{row['elements']:,}",
            *(f"{row[key]:.3g}" for key in ("delta_over_weight", *(key for _, key in columns))),
        )
        for row in losses
    ]
    used = "" if nearest_only else " This checkpoint was rounded stochastically; nearest is shown for comparison."
    return f"""\
## What rounding cost

Folding rounds each changed weight once, with an error e = round(W + d) − (W + d) for a delta d = α·ΔW. The loss is
‖e‖ / ‖d‖, the size of the error; the bias is |⟨e, d⟩| / ⟨d, d⟩, the share of the delta that is systematically missing.
Rounding to nearest swallows deltas smaller than half a step; stochastic rounding keeps them on average, which is what
a dot product sees.{used}

{_table(heads, rows, numbers_from=1)}"""


def _licences(manifest: Mapping[str, Any], sources: Sequence[Mapping[str, Any]] = ()) -> str:
    lines = []
    for source in sources or _sources(manifest):
        files = ", ".join(f"`{_plain(name)}`" for name in source["license_files"])
        texts = f" The text is here: {files}." if files else ""
        if _license_id(source) is None:
            lines.append(f"- {_link(source)} states no licence: ask its authors before you pass this on.{texts}")
        else:
            name, url, terms = _license(source)
            lines.append(f"- {_link(source)}: [{name}]({url}){f' ({terms})' if terms else ''}.{texts}")
    if llama := _llama_version(manifest["base"]):
        lines.append(
            f"\nLlama {llama} is licensed under the Llama {llama} Community License, Copyright © Meta Platforms, Inc. "
            "All Rights Reserved. Pass its terms on with the checkpoint, and let the name under which you publish it "
            "begin with “Llama”."
        )
    return "## Licences\n\nThe terms of every source apply to the merge.\n\n" + "\n".join(lines)


def _citation(manifest: Mapping[str, Any]) -> str:
    kinds = {adapter["kind"] for adapter in manifest["adapters"]}
    papers = "\n\n".join(paper for about, paper in _PAPERS.items() if about == "merging" or about in kinds)
    return f"## Citation\n\n```bibtex\n{papers}\n```"


def _sources(manifest: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [manifest["base"], *manifest["adapters"]]


def _license_id(source: Mapping[str, Any]) -> str | None:
    """What the source's card says; for a copy of Meta's Llama without its card, what its name says."""
    if source["license"]:
        return source["license"]
    named = re.match(r"(?:Meta-)?Llama-([234](?:\.\d)?)-", source["name"])
    return f"llama{named[1]}" if named else None


def _llama_version(source: Mapping[str, Any]) -> str | None:
    """``"3.1"`` where its licence is Meta's and asks for "Built with Llama" and a name with Llama (since Llama 3)."""
    version = re.fullmatch(r"llama(3(?:\.\d)?|4)", _license_id(source) or "")
    return version[1] if version else None


def _license(source: Mapping[str, Any]) -> tuple[str, str, str]:
    """Name of its licence, address of the text, and terms in brief (empty where the name has to do)."""
    license_id = _license_id(source) or ""
    if license_id in _LICENSES:
        return _LICENSES[license_id]
    if version := _llama_version(source):
        return f"Llama {version} Community License", f"{_LLAMA_MODELS}/{license_id.replace('.', '_')}/LICENSE", ""
    home = f"{_HUB}/{source['id']}" if source["id"] else f"{_HUB}/docs/hub/repositories-licenses"
    return license_id, home, ""


def _scaled(adapter: Mapping[str, Any]) -> str:
    alpha = adapter["alpha"]
    return (
        f"{adapter['name']} (α by module)" if alpha["modules"] else f"{_number(alpha['default'])} × {adapter['name']}"
    )


def _link(source: Mapping[str, Any]) -> str:
    return f"[{source['id']}]({_HUB}/{source['id']})" if source["id"] else f"`{_plain(source['name'])}`"


def _at(source: Mapping[str, Any]) -> str:
    return f" at [`{source['revision'][:12]}`]({_HUB}/{source['id']}/tree/{source['revision']})" if source["id"] else ""


def _table(heads: Iterable[str], rows: Iterable[tuple[str, ...]], numbers_from: int | None = None) -> str:
    heads = list(heads)
    rules = ["---:" if numbers_from is not None and at >= numbers_from else "---" for at in range(len(heads))]
    lines = [heads, rules, *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _plain(text: str) -> str:
    """A name that cannot break out of the line or the code span it is put in."""
    return " ".join(text.replace("`", "'").split())


def _strength(value: float | str) -> str:
    """A number, or a ramp in words: ``0.2 in the first layer to 0.8 in the last``."""
    if not isinstance(value, str):
        return _number(value)
    first, _, last = value.partition("..")
    return f"{first} in the first layer to {last} in the last"


def _number(value: float) -> str:
    return f"{value:g}"
