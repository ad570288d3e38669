"""Everything of a checkpoint directory that is not weights: config, index, tokenizer, licences."""

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from itertools import chain, count
from pathlib import Path
from typing import Any, TypeAlias

from mergekit_bio.audio.layout import merged_config, processor_config
from mergekit_bio.checkpoint.digest import file_sha256
from mergekit_bio.checkpoint.directory import INDEX, inside
from mergekit_bio.checkpoint.file_names import fitting
from mergekit_bio.checkpoint.source import licence_files
from mergekit_bio.errors import CheckpointError
from mergekit_bio.merging.merged_config import model_config
from mergekit_bio.merging.plan import MergePlan, Output
from mergekit_bio.outside_data import read_json

#: Taken together from whoever brought the vocabulary.
_TOKENIZER = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "*vocab*.json", "vocab.*", "merges.txt",
    "chat_template.*", "additional_chat_templates/*.jinja", "spiece.model", "spm*.model", "sentencepiece*.model",
    "*.spm", "tekken.json", "*.tiktoken", "bpe.codes", "dict.txt", "normalizer.json", "emoji.json", "byte_maps.json",
    "word_shape.json", "word_pronunciation.json", "prophetnet.tokenizer", "SYSTEM_PROMPT.txt",
)  # fmt: skip
#: The base's.
_SETTINGS = ("generation_config.json", "*processor_config.json")
#: A class of custom code, as ``auto_map`` names one: module and class, perhaps of another repository.
_CUSTOM_CLASS = re.compile(r"(?:(?P<repository>.+)--)?(?P<module>\w+)\.\w+")
#: What such a module imports of a module beside it, as Transformers finds that.
_OWN_IMPORT = re.compile(r"^\s*from\s+\.(\w+)(?:\.\w+)*\s+import\b", re.MULTILINE)

_EFFECTIVE = os.access in os.supports_effective_ids


#: What stands beside the weights of every checkpoint of a merge: name -> the file that it is copied from (tokenizer,
#: generation settings, licences), or a configuration to be written.
Companions: TypeAlias = Mapping[str, Path | Mapping[str, Any]]


def companions(plan: MergePlan, names: Sequence[str] | None = None) -> Companions:
    """Find out, before anything is written, what will stand beside the weights.

    Args:
        plan: The merge.
        names: What the adapters were called, if their directories are called otherwise now.

    Raises:
        CheckpointError: The base's config, or the tokenizer that an audio tower needs, is missing or damaged; a file
            that would be copied cannot be.
    """
    copies = dict(_copies(plan, names))
    for name, file in copies.items():
        try:
            name.encode()
        except UnicodeEncodeError:
            raise CheckpointError(
                f"{str(file)!r}: its name is not UTF-8, so no file can tell of it; rename it"
            ) from None
        if not os.access(file, os.R_OK, effective_ids=_EFFECTIVE):
            raise CheckpointError(f"{file}: may not be read; change its permissions")
    return {**copies, **_documents(plan)}


def write_companions(beside: Companions, output: Output, folder: Path) -> list[str]:
    """Write what stands beside the weights of one output into ``folder``.

    Returns:
        The names of the files.
    """
    contents = {**beside, INDEX: _index(output)} if len(output.files) > 1 else beside
    for name, content in contents.items():
        (folder / name).parent.mkdir(exist_ok=True)
        if isinstance(content, Path):
            shutil.copyfile(content, folder / name)
        else:
            (folder / name).write_bytes(_written(content))
    return sorted(contents)


def companion_sha256(content: Path | Mapping[str, Any]) -> str:
    """sha256 of a companion as it is written."""
    return file_sha256(content) if isinstance(content, Path) else sha256(_written(content)).hexdigest()


def _written(document: Mapping[str, Any]) -> bytes:
    return f"{json.dumps(document, indent=2, ensure_ascii=False)}\n".encode()


def adapter_licences(plan: MergePlan, names: Sequence[str] | None = None) -> list[dict[str, Path]]:
    """For each adapter its licence files, under names that do not clash: ``NAME-LICENSE`` -> where it is.

    Args:
        plan: The merge.
        names: As of :func:`companions`.
    """
    sources = [planned.adapter.source for planned in plan.adapters]
    taken: set[str] = set()
    licences = []
    for source, called in zip(sources, names or [source.name for source in sources], strict=True):
        stem = called.lstrip(".")  # hidden files are not pushed
        name = next(name for name in chain([stem], (f"{stem}-{suffix}" for suffix in count(2))) if name not in taken)
        taken.add(name)
        licences.append({fitting(name, f"-{file}"): source.path / file for file in licence_files(source)})
    return licences


def _copies(plan: MergePlan, names: Sequence[str] | None) -> Iterator[tuple[str, Path]]:
    base, tokenizer = plan.base.source.path, plan.tokenizer.folder
    code: set[Path] = set()  # the base's
    for origin, patterns in ((base, _SETTINGS), (tokenizer, _TOKENIZER)):
        files = {file for pattern in patterns for file in origin.glob(pattern) if file.is_file()}
        if origin == base:
            code |= {*base.glob("*.py")} if _named_modules(base, (*patterns, "config.json")) else set()
            files |= code
        else:
            needed = _with_imports(_named_modules(origin, patterns))
            _check_names(needed, code)
            files |= needed
        for name in sorted(file.relative_to(origin).as_posix() for file in files):
            yield name, inside(origin, name)
    for name in licence_files(plan.base.source):
        yield name, inside(base, name)
    for name, file in chain.from_iterable(licences.items() for licences in adapter_licences(plan, names)):
        yield name, inside(file.parent, file.name)


def _named_modules(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """The Python files that configurations name classes of; they are copied, and never run.

    Raises:
        CheckpointError: A module that one names is not there.
    """
    modules = []
    for file in sorted(file for pattern in patterns for file in folder.glob(pattern)):
        for name, module in _custom_classes(folder, file) if file.name.endswith("config.json") else ():
            modules.append(folder / f"{module}.py")
            if not modules[-1].is_file():
                raise CheckpointError(
                    f"{file}: auto_map names {name}, but {module}.py is not there: the merge could not be loaded; "
                    "fetch that file too"
                )
    return modules


def _with_imports(modules: Iterable[Path]) -> set[Path]:
    """Modules with those beside them that they import."""
    wanted, found = list(modules), set()
    while wanted:
        file = wanted.pop()
        if file.is_file() and file not in found:
            found.add(file)
            text = inside(file.parent, file.name).read_text(encoding="utf-8", errors="replace")
            wanted += [file.with_name(f"{module}.py") for module in _OWN_IMPORT.findall(text)]
    return found


def _check_names(needed: Iterable[Path], code: Iterable[Path]) -> None:
    """Refuse code of a tokenizer that would take the place of other code of the base."""
    of_base = {file.name: file for file in code}
    for file in sorted(needed):
        other = of_base.get(file.name, file)
        if other.read_bytes() != file.read_bytes():
            raise CheckpointError(
                f"{file}: the tokenizer needs it, and {other} is another of that name; rename one, or use "
                "--tokenizer base"
            )


def _custom_classes(folder: Path, file: Path) -> Iterator[tuple[str, str]]:
    """The classes that a configuration's ``auto_map`` names in modules beside it, and those modules."""
    try:
        classes = read_json(inside(folder, file.name)).get("auto_map")
    except CheckpointError:  # what is no JSON names none, and is copied as it is
        return
    for value in classes.values() if isinstance(classes, dict) else ():
        for name in value if isinstance(value, list) else [value]:
            custom = _CUSTOM_CLASS.fullmatch(name) if isinstance(name, str) else None
            if custom and not custom["repository"]:
                yield name, custom["module"]


def _documents(plan: MergePlan) -> dict[str, dict[str, Any]]:
    config = model_config(plan)
    if not plan.tower:
        return {"config.json": config}
    naturelm = dict(next(planned.adapter.config for planned in plan.adapters if planned.adapter.tower))
    tokenizer = read_json(inside(plan.tokenizer.folder, "tokenizer.json"))
    return {
        "processor_config.json": processor_config(text_config=config, naturelm_config=naturelm, tokenizer=tokenizer),
        "config.json": merged_config(text_config=config, naturelm_config=naturelm, tokenizer=tokenizer),
    }


def _index(output: Output) -> dict[str, Any]:
    weight_map = {name: file for file, shard in output.files.items() for name in shard.tensors}
    total = sum(shard.size - len(shard.header) for shard in output.files.values())
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
