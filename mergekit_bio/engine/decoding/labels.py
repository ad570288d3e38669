"""Answering from a closed list: the labels as a trie of tokens, walked by log-probabilities of next tokens."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from mergekit_bio.engine.interface import Generation
from mergekit_bio.errors import EngineError


class Query(NamedTuple):
    """A question to the model: how likely are these next tokens?

    Attributes:
        prompt: The number of the prompt.
        tokens: Generated tokens that follow it.
        candidates: The next tokens that are asked about.
    """

    prompt: int
    tokens: tuple[int, ...]
    candidates: tuple[int, ...]


#: Answers each query with the natural log-probabilities of its candidates, in their order.
NextLogprobs = Callable[[Sequence[Query]], list[list[float]]]


@dataclass
class Node:
    """A place in the trie: the beginning of one or more labels.

    Attributes:
        tokens: The path from the root.
        children: By next token.
        label: The label that ends here.
    """

    tokens: tuple[int, ...] = ()
    children: dict[int, "Node"] = field(default_factory=dict)
    label: str | None = None

    def inner(self) -> "Iterator[Node]":
        """The nodes that have children, from here on, parents before their children."""
        if self.children:
            yield self
            for child in self.children.values():
                yield from child.inner()


@dataclass
class Choice:
    """How far a prompt's walk down the trie is, and in the end the label that it chose.

    Attributes:
        node: Where it stands.
        logprobs: Of each token among the tokens that the list allows at its place; where the label is the beginning of
            another one, the log-probability of ending there follows.
    """

    node: Node
    logprobs: list[float] = field(default_factory=list)

    @property
    def label(self) -> str:
        """The label."""
        return self.node.label or ""


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
    choices = [Choice(root) for _ in range(prompts)]
    walking = list(range(prompts))
    while walking:
        # 1. Where only one token can follow, it follows, with certainty. A label that nothing follows is the answer.
        for prompt in walking:
            choice = choices[prompt]
            while len(choice.node.children) == 1 and choice.node.label is None:
                (choice.node,) = choice.node.children.values()
                choice.logprobs.append(0.0)
        walking = [prompt for prompt in walking if choices[prompt].node.children]
        # 2. Ask for all others at once how likely each way on is; and where a label ends, each end token.
        queries = []
        for prompt in walking:
            node = choices[prompt].node
            ends = tuple(eos_token_ids) if node.label is not None else ()
            queries.append(Query(prompt, node.tokens, (*node.children, *ends)))
        # 3. Take the likeliest way. Its log-probability is among the ways, not among the whole vocabulary.
        still_walking = []
        for prompt, logprobs in zip(walking, next_logprobs(queries), strict=True):
            choice = choices[prompt]
            children = list(choice.node.children.values())
            ways = logprobs[: len(children)]
            if choice.node.label is not None:
                ways = [*ways, log_sum_exp(logprobs[len(children) :])]
            best = max(range(len(ways)), key=ways.__getitem__)
            choice.logprobs.append(ways[best] - log_sum_exp(ways))
            if best < len(children):
                choice.node = children[best]
                still_walking.append(prompt)
        walking = still_walking
    return choices


def choice_generation(choice: Choice, *, prompt_tokens: int, seconds: float) -> Generation:
    """A choice as an engine's answer."""
    return Generation(choice.label, choice.node.tokens, tuple(choice.logprobs), "stop", prompt_tokens, seconds)


def score_labels(
    root: Node, labels: Sequence[str], *, prompts: int, next_logprobs: NextLogprobs
) -> list[dict[str, float]]:
    """Score every label for each prompt; what labels have in common is asked once.

    Args:
        root: Of :func:`build_trie`.
        labels: The order of the result.
        prompts: How many there are.
        next_logprobs: Asks the model.

    Returns:
        For each prompt label -> the sum of its tokens' natural log-probabilities.
    """
    inner = list(root.inner())
    queries = [Query(prompt, node.tokens, tuple(node.children)) for prompt in range(prompts) for node in inner]
    answers = iter(next_logprobs(queries))
    result = []
    for _ in range(prompts):
        sums = {root.tokens: 0.0}  # tokens so far -> the sum of their log-probabilities
        scores: dict[str, float] = {}
        for node in inner:
            for child, logprob in zip(node.children.values(), next(answers), strict=True):
                sums[child.tokens] = sums[node.tokens] + logprob
                if child.label is not None:
                    scores[child.label] = sums[child.tokens]
        result.append({label: scores[label] for label in labels})
    return result


def log_sum_exp(values: Sequence[float]) -> float:
    """``log(sum(exp(values)))``, without overflow."""
    top = max(values)
    return top + math.log(sum(math.exp(value - top) for value in values))
