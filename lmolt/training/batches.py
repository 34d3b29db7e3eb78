"""How triples become micro-batches: token ids, length limits, mismatched partners, balanced deterministic batches."""

import heapq
import random
from array import array
from collections import Counter
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch.utils.data import Dataset

from lmolt.distributed.strategy import shared_out
from lmolt.prompts import build_prompt, encode_output, encode_prompt


@dataclass(frozen=True)
class Example:
    """One tokenized triple. `mismatched` is another triple's output, for KTO's z (Eq. 11), or empty."""

    id: str
    direction: str
    prompt: array  # of int32: a Python integer takes eight times as much, for 127,000 triples and each process
    chosen: array
    rejected: array
    mismatched: array = field(default_factory=lambda: array("i"))
    source: str = ""  # as text, with the preferred output, for translations during evaluation
    target: str = ""
    other: str = ""  # the dis-preferred output, as text


@dataclass
class MicroBatch:
    """Examples of one forward pass. One that is not `live` only keeps a rank without work in step with the others."""

    examples: list[Example]
    live: bool
    references: torch.Tensor | None = None  # (n, 3) log-probabilities of chosen, rejected and mismatched


class Triples(Dataset):
    """Examples, drawn by (index, live) as `StepBatchSampler` does, with their `references` (N, 3) where a loss has."""

    def __init__(self, examples: list[Example]):
        self.examples, self.references = examples, None

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, drawn: tuple[int, bool]) -> tuple[Example, bool, torch.Tensor | None]:
        index, live = drawn
        return self.examples[index], live, None if self.references is None else self.references[index]


def collate(drawn: list[tuple[Example, bool, torch.Tensor | None]]) -> MicroBatch:
    examples, live, references = zip(*drawn, strict=True)
    return MicroBatch(list(examples), live[0], None if references[0] is None else torch.stack(references))


def encode_triples(
    triples: list[dict],
    tokenizer,
    max_length: int,
    on_too_long: str,
    *,
    with_rejected: bool = True,
    style: str = "paper",
) -> tuple[list[Example], Counter]:
    """Tokenize triples; those whose prompt and longer output exceed `max_length` tokens are dropped or an error.

    Returns the examples and how many were dropped, by cause. Nothing is ever cut. Without `with_rejected`, for a loss
    that doesn't read it, the dis-preferred output is left out and nothing is asked of it. Prompts are of a `style` of
    lmolt/prompts.py, which says too how an output's first token joins them. Processes tokenize a share each.
    """

    def encode(triple: dict) -> list[array]:
        asked = build_prompt(triple["direction"], triple["source"], style)
        outputs = [triple["chosen"], *([triple["rejected"]] if with_rejected else [])]
        ids = [encode_prompt(tokenizer, asked), *(encode_output(tokenizer, output, asked) for output in outputs)]
        return [array("i", its) for its in [*ids, *([] if with_rejected else [[]])]]

    examples, dropped, long = [], Counter(), []
    encoded = shared_out(encode, triples)
    for row, (triple, (prompt, chosen, rejected)) in enumerate(zip(triples, encoded, strict=True), start=1):
        length = len(prompt) + max(len(chosen), len(rejected))
        if length > max_length:
            long.append((length, row, triple["id"]))
            dropped[f"over {max_length} tokens ({triple['direction']})"] += 1
            continue
        if chosen == rejected:
            same = "" if triple["chosen"] == triple["rejected"] else ", as the tokenizer writes them"
            dropped[f"chosen equals rejected{same} ({triple['direction']})"] += 1
            continue
        texts = {"source": triple["source"], "target": triple["chosen"]}
        texts["other"] = triple["rejected"] if with_rejected else ""
        examples.append(Example(str(triple["id"]), triple["direction"], prompt, chosen, rejected, **texts))
    if long and on_too_long == "error":
        length, row, name = max(long)
        raise ValueError(
            f"{len(long)} of {len(triples)} triples take more than --max_length {max_length} tokens, the longest, "
            f"triple {row} (id {name!r}), {length}; raise it, or drop and count such rows with --max_length_policy drop"
        )
    return examples, dropped


def with_mismatches(examples: list[Example], seed: int) -> list[Example]:
    """The examples, each with an output of another source in its direction, preferred or not with equal chance.

    Drawn once over the whole data set and kept, so that KTO's z (Eq. 11) doesn't depend on how batches are formed.
    Never an output of the same source, nor one that equals the example's own outputs. `ValueError` if there is none.
    """
    draw, groups = random.Random(seed), {}
    for example in examples:
        groups.setdefault(example.direction, []).append(example)
    drawn = {}
    for direction, group in sorted(groups.items()):
        for example in group:
            for _ in range(100):
                other = draw.choice(group)
                output = draw.choice((other.chosen, other.rejected))
                if other.prompt != example.prompt and output not in (example.chosen, example.rejected):
                    drawn[id(example)] = output
                    break
            else:
                raise ValueError(
                    f"KTO's z needs an output of another source for each {direction} triple, and 100 draws found none "
                    f"for id {example.id!r}; the data are too few or too uniform"
                )
    return [replace(example, mismatched=drawn[id(example)]) for example in examples]


def tree_costs(examples: list[Example]) -> list[int]:
    """Tokens that each example adds to a tree beyond its direction's shared instruction."""
    shared = {}
    for direction in {example.direction for example in examples}:
        prompts = [example.prompt for example in examples if example.direction == direction]
        low, high = min(prompts), max(prompts)  # the prefix common to the extremes is common to all
        different = (at for at, (a, b) in enumerate(zip(low, high, strict=False)) if a != b)
        shared[direction] = next(different, 0 if len(prompts) == 1 else min(len(low), len(high)))
    return [len(e.prompt) - shared[e.direction] + len(e.chosen) + len(e.rejected) for e in examples]


def balance(indices: list[int], costs: list[int], bins: int, most: int | None) -> list[list[int]]:
    """Partition `indices` into `bins` of near-equal cost: the costliest first, each to the lightest bin with room."""
    parts = [[] for _ in range(bins)]
    lightest = [(0, number) for number in range(bins)]  # a heap of (load, bin)
    for index in sorted(indices, key=lambda i: (-costs[i], i)):
        load, number = heapq.heappop(lightest)
        parts[number].append(index)
        if most is None or len(parts[number]) < most:
            heapq.heappush(lightest, (load + costs[index], number))
    return parts


def tokens_that_fit(model, checkpointing: bool) -> int:
    """Tokens of a micro-batch whose activations take 60 % of what the weights leave of this GPU; at most 8,192.

    By arithmetic, with what was measured on a 7B (docs/performance.md): in bf16 a layer keeps of each token 15 numbers
    as wide as its hidden state and 8 as wide as its MLP (LoRA's inputs and dropout masks are among them), with
    checkpointing one, and one layer's whole with its backward pass, 9 more. Beyond 8,192 tokens a GPU gains nothing.
    """
    config = model.config.get_text_config()
    hidden, layers = config.hidden_size, config.num_hidden_layers
    experts = getattr(config, "num_experts_per_tok", None) or 1
    wide = experts * (
        getattr(config, "moe_intermediate_size", None) or getattr(config, "intermediate_size", 4 * hidden)
    )
    layer = 2 * (15 * hidden + 8 * wide)
    a_token = 2 * hidden * layers + layer + 2 * 9 * hidden if checkpointing else layer * layers
    weights = sum(p.numel() * p.element_size() + 12 * p.numel() * p.requires_grad for p in model.parameters())
    left = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory - weights
    return int(min(8192, max(1, 0.6 * left / a_token)))


class StepBatchSampler:
    """Micro-batches of `(index, live)` for one rank, the same optimizer steps however they are split.

    Each epoch is shuffled by seed and cut into steps of `pairs_per_step` triples; each step's triples are spread over
    `micro_batches * world` bins of near-equal cost. Every row is drawn once an epoch; a rank left without work in the
    last step gets a row that is not live, so that all ranks run equally many forward passes.
    """

    def __init__(self, costs, pairs_per_step, micro_batches=1, *, most=None, rank=0, world=1, seed=0, shuffle=True):
        self.costs, self.pairs_per_step, self.micro_batches, self.most = (
            costs,
            pairs_per_step,
            micro_batches,
            most,
        )
        self.rank, self.world, self.seed, self.shuffle, self.epoch = rank, world, seed, shuffle, 0

    def __len__(self):
        return -(-len(self.costs) // self.pairs_per_step) * self.micro_batches

    def set_epoch(self, epoch: int):
        self.epoch = epoch

    def steps(self) -> list[list[int]]:
        """The triples of each optimizer step of this epoch."""
        order = np.arange(len(self.costs))
        if self.shuffle:
            np.random.default_rng([self.seed, self.epoch]).shuffle(order)
        return [order[at : at + self.pairs_per_step].tolist() for at in range(0, len(order), self.pairs_per_step)]

    def __iter__(self):
        for step in self.steps():
            parts = balance(step, self.costs, self.micro_batches * self.world, self.most)
            for part in parts[self.rank :: self.world]:
                yield [(index, True) for index in part] or [(step[0], False)]


def micro_batches_for(costs, pairs_per_step, tokens_per_batch, *, world, seed, epochs) -> int:
    """The fewest micro-batches a step that keep every micro-batch of every epoch within `tokens_per_batch`."""
    if max(costs) > tokens_per_batch:
        raise ValueError(
            f"one triple alone takes {max(costs)} tokens, over --tokens_per_batch {tokens_per_batch}; raise it"
        )
    needed = 1
    for epoch in range(epochs):
        sampler = StepBatchSampler(costs, pairs_per_step, seed=seed)
        sampler.set_epoch(epoch)
        for step in sampler.steps():
            fits = False
            while not fits:
                parts = balance(step, costs, needed * world, None)
                fits = max(sum(costs[i] for i in part) for part in parts) <= tokens_per_batch
                needed += not fits
    return needed
