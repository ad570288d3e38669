"""The pages that users read, cut into blocks and commands."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import dropwhile
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, or one command of it."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line} {' '.join(self.text.splitlines()[0].split('  #')[0].split())}"

    @property
    def words(self) -> list[str]:
        """Of a command, without the variables that are set for it."""
        return [*dropwhile(re.compile(r"\w+=").match, shlex.split(self.text, comments=True))]


def blocks() -> Iterator[Block]:
    for page in PAGES:
        text = page.read_text()
        for found in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            yield Block(page, text.count("\n", 0, found.start()) + 2, found[1], found[2])


def in_language(language: str) -> list[Block]:
    return [block for block in blocks() if block.language == language]


def commands() -> Iterator[Block]:
    """The lines of sh blocks, continued ones joined."""
    for block in in_language("sh"):
        joined = re.sub(r"\\\n *", lambda found: " " * len(found[0]), block.text)
        start = 0
        for line in joined.splitlines():
            if shlex.split(line, comments=True):
                number = block.line + block.text.count("\n", 0, start)
                yield Block(block.page, number, "sh", line)
            start += len(line) + 1


#: What other people's clients do with a server. eval/clients.py runs it.
CLIENTS = [
    block
    for block in (*in_language("python"), *commands())
    if "127.0.0.1:8000" in block.text and "mergekit-bio" not in block.text
]
#: Scripts, each run as a whole.
SCRIPTS = in_language("bash")
COMMANDS = list(commands())
OURS = [command for command in COMMANDS if command.words[0] == "mergekit-bio"]


def is_merge_recipe(block: Block) -> bool:
    return not {"datasets", "extended", "model"} & yaml.safe_load(block.text).keys()


def starts_an_engine(command: Block) -> bool:
    """Whether it asks a model many things, for minutes, through vLLM where that is installed."""
    _, name, *options = command.words
    if name == "ask":
        return "--out" in options
    if name == "eval" and "--probe" not in options:
        return not {"--dry-run", "--show-prompts", "--fetch-only"} & {*options}
    return name in ("serve", "demo", "eval")
