"""A loaded model proved against itself: what is fast against plain attention, one row, no cache, on the same weights.

    |sum log p (fast) - sum log p (plain)|  <=  max(FLOOR, FACTOR * sigma * sqrt(tokens))        in nats a sequence

sigma is what rounding does to one token's log-probability in this model at its precision. It is measured and not
assumed: the plain pass is run again with each linear layer's output changed by as much as its rounding may. Errors of
rounding add up like a random walk, so the bound grows with the square root of a sequence's tokens: two tokens of a
model with large logits are not refused, and forty of a model that was trained a little further are not let through.

In bf16, fp16 and NF4 what rounding explains can hide a dropped sink or a leaking state. There the same is looked at in
fp32 first, through the first layers of each kind; then in its own precision, by the same bound.
"""

import inspect
import math
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from lmolt.models.attention import why_not_tree
from lmolt.models.excerpt import (
    FAILURES,
    SECONDS,
    Excerpt,
    Sequences,
    excerpt,
    in_fp32,
    is_exact,
    room_for,
    room_in_fp32,
    rounds_products,
)
from lmolt.models.tree import build_tree, padded_logps, tree_logps

FACTOR = 8.0
LONGEST = 4608  # tokens of a sequence that is made longer than a window, where the data's are shorter
FLOOR = 1e-3  # nats a sequence: an SSM's scan in chunks and its steps one by one differ by so much in fp32


@dataclass(frozen=True)
class Plain:
    """What plain attention gives for some sequences, and how far from it rounding may lead."""

    sequences: Sequences
    logps: torch.Tensor  # (N,), float64
    sigma: float  # nats a token

    def allowed(self) -> torch.Tensor:
        tokens = torch.tensor([len(output) for _, output in self.sequences], dtype=torch.float64)
        return (FACTOR * self.sigma * tokens.sqrt()).clamp(min=FLOOR)

    def compare(self, what: str, logps: torch.Tensor) -> "Comparison":
        """How `logps` (N,) of the same sequences differ from these: the sequence that is furthest over its bound."""
        difference, allowed = (logps.detach().double().cpu() - self.logps).abs(), self.allowed()
        worst = int(torch.nan_to_num(difference / allowed, nan=torch.inf).argmax())
        longest = max(len(prompt) + len(output) for prompt, output in self.sequences)
        return Comparison(what, len(self.sequences), longest, difference[worst].item(), allowed[worst].item())


@dataclass(frozen=True)
class Comparison:
    what: str
    sequences: int
    longest: int  # tokens
    difference: float  # nats of a sequence
    allowed: float

    @property
    def holds(self) -> bool:
        return self.difference <= self.allowed  # NaN is not

    def __str__(self) -> str:
        return (
            f"{self.what} {'equals' if self.holds else 'differs from'} plain attention on {self.sequences} sequences "
            f"of up to {self.longest} tokens (by {self.difference:.2g} nats a sequence; rounding explains "
            f"{self.allowed:.2g})"
        )


def plain(model, sequences: Sequences) -> Plain:
    """The plain way: eager attention on the loaded weights, a row at a time, no mask, no cache.

    `model` may be wrapped (DDP, DeepSpeed, FSDP, PEFT) and is left as it was; all ranks call with the same sequences.
    """
    with torch.no_grad(), evaluating(model), plain_attention(model):
        logps = torch.tensor([_row_logp(model, *sequence) for sequence in sequences], dtype=torch.float64)
        squares, tokens = 0.0, 0
        with _rounded_otherwise(model):
            # of all: two draws that happen to be small would make a right model look wrong
            for sequence, logp in zip(sequences, logps.tolist(), strict=True):
                squares += (_row_logp(model, *sequence) - logp) ** 2
                tokens += len(sequence[1])
    return Plain(sequences, logps, math.sqrt(squares / tokens))


def choose_scoring(
    model, sequences: Sequences, packing: str, device, context, say: Callable, made: Sequences = (), seconds=SECONDS
) -> str:
    """How `model` is to score: "tree" or "padded", whichever of the two, from `packing` on, plain attention confirms.

    `context` is the precision that training computes in. `made` are sequences beside the run's own, longer than a
    window. Where all of them through all layers take longer than `seconds`, a part is looked at (excerpt.py), and
    `say` tells which; what a part doesn't confirm is decided on all layers. Where the numbers of no packing hold, the
    model's own eager attention is set, and then `ValueError`. `say` tells what was compared, and why a way was left.
    """
    inner, made = inner_model(model), list(made)
    if packing == "tree" and (reason := why_not_tree(inner)):
        say(f"{inner.config.model_type}: {reason}; rows are padded instead of packed into trees")
        packing = "padded"
    try:
        with context():
            part = Excerpt(sequences + made, 1, 1)
            if hasattr(model, "get_output_embeddings"):  # else its weights are gathered layer by layer, in their order
                exact = is_exact(model)
                seconds = seconds if exact else seconds / 2
                part = excerpt(inner, sequences, made, packing, lambda some: seconds_of(model, some), seconds)
                if not exact:
                    packing = _exactly(model, part, packing, device, say)
            if part.layers < part.of_layers and (found := _first_look(model, part, packing, device)):
                say(f"self-check: {found}{left_out(part, inner.config)}")
                return packing
            sequences = part.sequences
            known = plain(model, sequences)
            refuse_if_later_tokens_count(model, sequences, known)
    except torch.OutOfMemoryError:
        raise
    except FAILURES as error:  # such as a state-space layer that reads its weight, which NF4 packs
        raise ValueError(
            f"{inner.config.model_type} can't be run as it is loaded: {type(error).__name__} {str(error)[:200]}; "
            "with --load_in_4bit false it may"
        ) from error
    part = part.whole()
    ways = ["tree"] * (packing == "tree") + ["padded"] + ["padded, eager"] * takes_attention(type(inner))
    for way in ways:
        if way == "padded, eager":
            use_eager(model)
        try:
            with torch.no_grad(), evaluating(model), context():
                logps = score(model, sequences, way, device)
        except torch.OutOfMemoryError:
            raise
        except (ValueError, *FAILURES) as error:
            say(f"self-check: {way} rows: {type(error).__name__}: {str(error)[:200]}; not used")
            continue
        found = known.compare(f"{way.replace('tree', 'tree-packed')} scoring", logps)
        say(f"self-check: {found}" + (left_out(part, inner.config) if found.holds else "; not used"))
        if found.holds:
            return way.split(",")[0]
    raise ValueError(
        f"{inner.config.model_type}: no way of scoring several sequences gives what plain attention does on the same "
        f"weights ({found}); this model can't be trained here"
    )


def _exactly(model, part: Excerpt, packing: str, device, say: Callable) -> str:
    """`packing`, or what is left of it: the same comparison in fp32."""
    for way in ["tree"] * (packing == "tree") + ["padded"]:
        found = exactly(model, part, lambda few, way=way: _look(model, few, way, device))
        if found is None:
            return packing
        if found.holds:
            return way
        say(f"self-check: in fp32, {found}; not used")
    if takes_attention(type(inner_model(model))):
        use_eager(model)
    return "padded"


def exactly(model, part: Excerpt, look: Callable[[Excerpt], "Comparison | None"]) -> "Comparison | None":
    """What `look` finds in fp32 through the first layers of each kind; None for a class that can't be run so, or where
    memory has no room: its own precision decides alone."""
    few = replace(part, layers=part.few or part.of_layers)
    with few.of(inner_model(model)):
        if not room_in_fp32(model):
            return None
        try:
            with in_fp32(model):
                return look(few)
        except torch.OutOfMemoryError:
            raise
        except (ValueError, *FAILURES):
            return None


def _look(model, part: Excerpt, way: str, device) -> "Comparison":
    with torch.no_grad(), evaluating(model):
        known = plain(model, part.sequences)
        refuse_if_later_tokens_count(model, part.sequences, known)
        logps = score(model, part.sequences, way, device)
    return known.compare(f"{way.replace('tree', 'tree-packed')} scoring", logps)


def _first_look(model, part: Excerpt, way: str, device) -> "Comparison | None":
    """The comparison on a part of the layers, where it confirms `way`."""
    try:
        with part.of(inner_model(model)):
            found = _look(model, part, way, device)
    except torch.OutOfMemoryError:
        raise
    except (ValueError, *FAILURES):  # a class that isn't run in parts; whatever it is, all layers will show it
        return None
    return found if found.holds else None


def left_out(part: Excerpt, config) -> str:
    longest = max(len(prompt) + len(output) for prompt, output in part.sequences)
    unseen = [str(window) for window in windows(config) if window >= longest]
    window = f"; none is longer than the window of {' and '.join(unseen)}, which is not seen" if unseen else ""
    return window + (f"; left out, to take no longer: {part}" if str(part) else "")


def seconds_of(model, sequences: Sequences) -> float:
    """How long the plain way takes."""
    with torch.no_grad(), evaluating(model), plain_attention(model):
        start = time.perf_counter()
        for sequence in sequences:
            _row_logp(model, *sequence)
    return time.perf_counter() - start


def score(model, sequences: Sequences, way: str, device) -> torch.Tensor:
    if way == "tree":
        return tree_logps(model, build_tree(sequences).to(device))
    return padded_logps(model, sequences)


def takes_attention(model_class) -> bool:
    """Whether the layers of a class call an attention function by name, so that another can be set."""
    return model_class._supports_attention_backend and model_class._can_set_attn_implementation()


def use_eager(model) -> None:
    for config in _configs(model):
        config._attn_implementation_internal = "eager"


def at_hand(triples: list[tuple[list[int], list[int], list[int]]], model) -> tuple[Sequences, Sequences]:
    """What a run's own (prompt, chosen, rejected) offer for the check: both outputs of the two longest triples and of
    the shortest; and, made where layers see so many tokens only and no sequence has more, the longest triple behind
    its own prompt, as often as it takes."""
    ordered = sorted(triples, key=lambda t: (len(t[0]) + max(len(t[1]), len(t[2])), t))
    chosen = [ordered[i] for i in sorted({0, max(0, len(ordered) - 2), len(ordered) - 1})]
    prompt, longest, _ = ordered[-1]
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or math.inf
    made = []
    for window in windows(model.config):
        repeats = 1 + window // len(prompt)
        length = len(prompt) * repeats + len(longest)
        if len(prompt) + len(longest) <= window and length <= min(LONGEST, positions) and room_for(model, length, 8):
            made.append((prompt * repeats, longest, longest[:-1]))
    pairs = lambda chosen: [(prompt, output) for prompt, *outputs in chosen for output in outputs if output]
    return pairs(chosen), pairs(made)


def refuse_if_later_tokens_count(model, sequences: Sequences, known: Plain) -> None:
    """`ValueError` for a model whose tokens see those behind them (BERT and its kin): it gives no log p(output)."""
    prompt, output = sequences[0]
    with torch.no_grad(), evaluating(model), plain_attention(model):
        alone = _row_logp(model, prompt, output[:1])
        before = _row_logp(model, prompt, output, first=True)
    if not abs(alone - before) <= max(FACTOR * known.sigma, FLOOR):
        raise ValueError(
            f"{inner_model(model).config.model_type}: a token's probability changes by {abs(alone - before):.2g} nats "
            "with the tokens behind it, so this is no causal language model; take one that is"
        )


def _row_logp(model, prompt: list[int], output: list[int], first: bool = False) -> float:
    """log p(output | prompt), summed in float64; with `first`, of the output's first token only."""
    device = next(model.parameters()).device
    targets = torch.tensor(output, device=device)[:, None]
    if inner_model(model).config.is_encoder_decoder:
        begun = torch.tensor([[decoder_start(inner_model(model)), *output[:-1]]], device=device)
        logits = model(input_ids=torch.tensor([prompt], device=device), decoder_input_ids=begun, use_cache=False).logits
        logits = logits[0].float()
        return (logits.gather(-1, targets)[:, 0] - logits.logsumexp(-1)).sum(dtype=torch.float64).item()
    ids = torch.tensor([prompt + output], device=device)
    kept = {"logits_to_keep": len(output) + 1} if "logits_to_keep" in _parameters(model) else {}
    logits = model(input_ids=ids, use_cache=False, **kept).logits[0, -len(output) - 1 : -1].float()
    logps = logits.gather(-1, targets)[:, 0] - logits.logsumexp(-1)
    return (logps[:1] if first else logps).sum(dtype=torch.float64).item()


def inner_model(model):
    """The transformers model inside DDP, DeepSpeed, FSDP and PEFT."""
    while not hasattr(model, "get_output_embeddings"):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder_start(model) -> int:
    """The token that an encoder-decoder's outputs begin after; `ValueError` where its files name none."""
    for settings in (model.generation_config, model.config):
        if (start := getattr(settings, "decoder_start_token_id", None)) is not None:
            return start
    raise ValueError(
        f"a {model.config.model_type} that names no decoder_start_token_id, in config.json or generation_config.json"
    )


def windows(config) -> list[int]:
    """How many tokens back the model's layers see, those that don't see all: sliding windows and chunks."""
    config = config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None)
    kinds = set(kinds) if kinds is not None else {"sliding_attention", "chunked_attention"}
    found = [getattr(config, "sliding_window", None)] * any("sliding" in kind for kind in kinds)
    found += [getattr(config, "attention_chunk_size", None)] * ("chunked_attention" in kinds)
    found += [
        max(window) if isinstance(window, list | tuple) else window for window in [getattr(config, "window_size", None)]
    ]
    return sorted(window for window in found if window)


def _parameters(model) -> set[str]:
    return set(inspect.signature(type(inner_model(model)).forward).parameters)


@contextmanager
def evaluating(model):
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def plain_attention(model):
    """The model's own eager attention on the weights as they lie; a class that has no other keeps it."""
    before = [(config, config._attn_implementation) for config in _configs(model)]
    use_eager(model)
    try:
        yield
    finally:
        for config, attention in before:
            config._attn_implementation_internal = attention


def _configs(model) -> list:
    """The configurations that the model's modules read."""
    found = (getattr(module, "config", None) for module in inner_model(model).modules())
    return list({id(config): config for config in found if isinstance(config, PretrainedConfig)}.values())


@contextmanager
def _rounded_otherwise(model):
    """Each linear layer's output changed by up to its precision's step at the row's size, as another order of
    summation would round it."""
    draw, tf32 = {}, rounds_products(next(model.parameters()).device.type)

    def hook(module, inputs, output):
        if not torch.is_tensor(output) or not output.is_floating_point():
            return output
        if output.device not in draw:
            draw[output.device] = torch.Generator(output.device).manual_seed(0)
        noise = torch.empty_like(output, dtype=torch.float32).uniform_(-1, 1, generator=draw[output.device])
        step = 2**-10 if output.dtype == torch.float32 and tf32 else torch.finfo(output.dtype).eps
        size = output.float().pow(2).mean(-1, keepdim=True).sqrt() * step
        return (output.float() + noise * size).to(output.dtype)

    linear = [m for m in inner_model(model).modules() if isinstance(m, torch.nn.Linear | Conv1D | torch.nn.Embedding)]
    hooks = [module.register_forward_hook(hook) for module in linear]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()
