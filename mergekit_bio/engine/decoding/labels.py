"""Answering from a closed list: the labels as a trie of tokens, walked by log-probabilities of next tokens."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mergekit_bio.engine.interface import LabelScore
from mergekit_bio.errors import EngineError

#: Generated tokens that follow the prompt of that number, and the next tokens asked about.
Query = tuple[int, tuple[int, ...], tuple[int, ...]]
#: Answers each query with the natural log-probabilities of its tokens, in their order.
NextLogprobs = Callable[[Sequence[Query]], list[list[float]]]


@dataclass
class Node:
    """Tokens that labels begin with.

    Attributes:
        tokens: The path from the root.
        children: By next token.
        label: The label that ends here.
    """

    tokens: tuple[int, ...] = ()
    children: dict[int, "Node"] = field(default_factory=dict)
    label: str | None = None

    @property
    def is_fork(self) -> bool:
        """Whether there is anything to decide."""
        return len(self.children) + (self.label is not None) > 1


@dataclass(frozen=True)
class Choice:
    """The label a walk ended at.

    Attributes:
        label: The label.
        token_ids: Its tokens.
        logprobs: Of each among the tokens allowed at its place; where the label is the beginning of another one,
            the log-probability of ending there follows.
    """

    label: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


def build_trie(labels: Sequence[str], encode: Callable[[str], list[int]]) -> Node:
    """Tokenize labels, each on its own, into a trie.

    Raises:
        EngineError: There is no label, one is empty, or two are the same tokens.
    """
    root = Node()
    for label in labels:
        tokens = encode(label)
        if not tokens:
            raise EngineError("a label is empty; every label needs at least one character")
        node = root
        for token in tokens:
            node = node.children.setdefault(token, Node((*node.tokens, token)))
        if node.label is not None:
            raise EngineError(f"the label {label!r} is in the list twice")
        node.label = label
    if not root.children:
        raise EngineError("the list of labels is empty")
    return root


def choose(root: Node, *, prompts: int, eos_token_ids: Sequence[int], next_logprobs: NextLogprobs) -> list[Choice]:
    """Walk down the trie for each prompt, always to the likeliest of what the list allows.

    Where a label is also the beginning of another one, ending competes with going on: with the probability of all
    end tokens together.

    Args:
        root: Of :func:`build_trie`.
        prompts: How many there are.
        eos_token_ids: What ends an answer.
        next_logprobs: Asks the model.
    """
    nodes = [root] * prompts
    logprobs: list[list[float]] = [[] for _ in range(prompts)]
    done: list[Choice | None] = [None] * prompts
    while open_ := [n for n in range(prompts) if done[n] is None]:
        asked = []
        for n in open_:
            while not nodes[n].is_fork and nodes[n].children:
                nodes[n] = next(iter(nodes[n].children.values()))
                logprobs[n].append(0.0)
            if nodes[n].children:
                asked.append(n)
            else:
                done[n] = Choice(nodes[n].label or "", nodes[n].tokens, tuple(logprobs[n]))
        queries = [(n, nodes[n].tokens, _options(nodes[n], eos_token_ids)) for n in asked]
        for n, found in zip(asked, next_logprobs(queries), strict=True):
            children = list(nodes[n].children.values())
            scores = found[: len(children)]
            ends = nodes[n].label is not None
            if ends:
                scores = [*scores, log_sum_exp(found[len(children) :])]
            best = max(range(len(scores)), key=scores.__getitem__)
            logprobs[n].append(scores[best] - log_sum_exp(scores))
            if ends and best == len(children):
                done[n] = Choice(nodes[n].label or "", nodes[n].tokens, tuple(logprobs[n]))
            else:
                nodes[n] = children[best]
    return [choice for choice in done if choice is not None]


def score_labels(
    root: Node, labels: Sequence[str], *, prompts: int, next_logprobs: NextLogprobs
) -> list[list[LabelScore]]:
    """Score every label for each prompt; what labels have in common is asked once.

    Args:
        root: Of :func:`build_trie`.
        labels: The order of the result.
        prompts: How many there are.
        next_logprobs: Asks the model.
    """
    inner = [node for node in _walk(root) if node.children]
    queries = [(n, node.tokens, tuple(node.children)) for n in range(prompts) for node in inner]
    answers = iter(next_logprobs(queries))
    result = []
    for _ in range(prompts):
        sums = {root.tokens: 0.0}
        scores: dict[str, LabelScore] = {}
        for node in inner:  # parents come before their children
            for child, logprob in zip(node.children.values(), next(answers), strict=True):
                sums[child.tokens] = sums[node.tokens] + logprob
                if child.label is not None:
                    scores[child.label] = LabelScore(child.label, sums[child.tokens], len(child.tokens))
        result.append([scores[label] for label in labels])
    return result


def log_sum_exp(values: Sequence[float]) -> float:
    """``log(sum(exp(values)))``, without overflow."""
    top = max(values)
    return top + math.log(sum(math.exp(value - top) for value in values))


def _options(node: Node, eos_token_ids: Sequence[int]) -> tuple[int, ...]:
    return (*node.children, *(eos_token_ids if node.label is not None else ()))


def _walk(node: Node) -> list[Node]:
    found = [node]
    for child in node.children.values():
        found += _walk(child)
    return found
