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


@dataclass(eq=False, slots=True)
class Node:
    """A place in the trie: the beginning of one or more labels.

    Attributes:
        parent: The place before it; None for the root.
        token: What leads here from there.
        depth: Tokens from the root to here.
        children: By next token.
        label: The label that ends here.
    """

    parent: "Node | None" = None
    token: int = -1
    depth: int = 0
    children: dict[int, "Node"] = field(default_factory=dict)
    label: str | None = None

    @property
    def tokens(self) -> tuple[int, ...]:
        """The path from the root."""
        path: list[int] = []
        node = self
        while node.parent is not None:
            path.append(node.token)
            node = node.parent
        return tuple(reversed(path))

    def child(self, token: int) -> "Node":
        """The place that a token leads to, made where there is none."""
        if token not in self.children:
            self.children[token] = Node(self, token, self.depth + 1)
        return self.children[token]

    def all(self) -> "Iterator[Node]":
        """This node and those below it, parents before their children."""
        left = [self]
        while left:
            node = left.pop()
            yield node
            left.extend(reversed(node.children.values()))

    def unforked(self) -> "Iterator[Node]":
        """This node and those below it, up to the next fork or the next end of a label."""
        node = self
        yield node
        while len(node.children) == 1 and node.label is None:
            (node,) = node.children.values()
            yield node

    def candidates(self, eos_token_ids: Sequence[int]) -> tuple[int, ...]:
        """The next tokens that matter here: those on which labels go on, and where one ends, each end token."""
        return (*self.children, *(eos_token_ids if self.label is not None else ()))


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
            node = node.child(token)
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
            *passed, choice.node = choice.node.unforked()
            choice.logprobs += [0.0] * len(passed)
        walking = [prompt for prompt in walking if choices[prompt].node.children]
        # 2. Ask for all others at once how likely each way on is; and where a label ends, each end token.
        nodes = [(prompt, choices[prompt].node) for prompt in walking]
        queries = [Query(prompt, node.tokens, node.candidates(eos_token_ids)) for prompt, node in nodes]
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


def longest_label(root: Node) -> int:
    """Tokens of the longest label."""
    return max(node.depth for node in root.all())


def score_labels(
    root: Node,
    labels: Sequence[str],
    *,
    prompts: int,
    eos_token_ids: Sequence[int],
    next_logprobs: NextLogprobs,
    negligible: float = 0.0,
) -> list[dict[str, float]]:
    """Score every label as a whole answer, its end included, for each prompt; what labels have in common is asked once.

    Without the end a label could never be less likely than another one that begins with it: "wren" would beat "wren
    babbler" whatever is heard.

    Args:
        root: Of :func:`build_trie`.
        labels: The order of the result.
        prompts: How many there are.
        eos_token_ids: What ends an answer.
        next_logprobs: Asks the model.
        negligible: 0 scores every label. Above, those that all together have less than this share of the probability
            of all labels are not asked for: of a long list a few remain.

    Returns:
        For each prompt label -> the sum of its tokens' natural log-probabilities and of the log-probability of ending
        there, with whichever end token; minus infinity for a label that was not asked for.
    """
    searches = [LabelSearch(root, eos_token_ids, negligible) for _ in range(prompts)]
    while asked := [(prompt, node) for prompt, search in enumerate(searches) for node in search.next()]:
        queries = [Query(prompt, node.tokens, node.candidates(eos_token_ids)) for prompt, node in asked]
        for (prompt, node), logprobs in zip(asked, next_logprobs(queries), strict=True):
            searches[prompt].take(node, logprobs)
    return [search.scores(labels) for search in searches]


#: The likeliest ways, and those that are less likely by no more than this factor, are followed at the same time.
_TOGETHER = 100.0


class LabelSearch:
    """Scores labels for one prompt, the likeliest first: :func:`score_labels` for whoever asks the model otherwise.

    Args:
        root: Of :func:`build_trie`.
        ends: What ends an answer.
        negligible: As for :func:`score_labels`.

    Attributes:
        found: Label -> its score.
    """

    def __init__(self, root: Node, ends: Sequence[int], negligible: float) -> None:
        self.found: dict[str, float] = {}
        self._ends, self._negligible = ends, negligible
        self._sums = {root: 0.0}  # place -> the sum of the log-probabilities of the tokens up to there
        self._open = [root]
        self._asked: set[Node] = set()

    def next(self) -> list[Node]:
        """The places to ask about now, parents before their children; none where the search is over."""
        bounds = [self._sums[node] for node in self._open]
        if not self._negligible:
            asked = [below for node in self._open for below in node.all()]
            self._open = []
        # No label is likelier than its beginning, nor are all labels together that begin alike. So what is open bounds
        # what can still be found.
        elif not bounds or (
            self.found and log_sum_exp(bounds) < log_sum_exp([*self.found.values()]) + math.log(self._negligible)
        ):
            return []
        else:
            least = max(bounds) - math.log(_TOGETHER)
            likely = [node for node, bound in zip(self._open, bounds, strict=True) if bound >= least]
            self._open = [node for node, bound in zip(self._open, bounds, strict=True) if bound < least]
            # A way without a fork is asked about to its end: that is one step of the model instead of many.
            asked = [node for begun in likely for node in begun.unforked()]
        self._asked = set(asked)
        return [node for node in asked if node.candidates(self._ends)]

    def take(self, node: Node, logprobs: Sequence[float]) -> None:
        """Note how likely the candidates of a place are."""
        reached = self._sums[node]
        for child, logprob in zip(node.children.values(), logprobs, strict=False):
            self._sums[child] = reached + logprob
            if not child.candidates(self._ends) and child.label is not None:  # the model has no end tokens
                self.found[child.label] = reached + logprob
            elif child not in self._asked:
                self._open.append(child)
        if node.label is not None:
            ends = logprobs[len(node.children) :]
            self.found[node.label] = reached + (log_sum_exp(ends) if ends else 0.0)

    def scores(self, labels: Sequence[str]) -> dict[str, float]:
        """For each label its score; minus infinity where it was not asked for."""
        return {label: self.found.get(label, -math.inf) for label in labels}


def log_sum_exp(values: Sequence[float]) -> float:
    """``log(sum(exp(values)))``, without overflow."""
    top = max(values)
    return top + math.log(sum(math.exp(value - top) for value in values))
