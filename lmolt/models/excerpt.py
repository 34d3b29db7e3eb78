"""The part of a model and of its sequences that a check of a few seconds can look at.

What attention, a cache or a tree gets wrong shows in a layer of the kind that it gets wrong. So where all layers take
too long, the first ones are run alone, as many as it takes to have each kind of layer among them, with the model's own
embeddings, norm and head around them. Nothing is copied: the list of layers is exchanged for the time of the check.
"""

from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import psutil
import torch

SECONDS = 2.2  # what is planned; finding out what fits brings it to about 3
LEAST = 48  # tokens of a sequence that is cut
FAILURES = (RuntimeError, TypeError, KeyError, IndexError, AttributeError, AssertionError)  # of a model's code
Sequences = list[tuple[list[int], list[int]]]


@dataclass(frozen=True)
class Excerpt:
    """`sequences` through the first `layers` of `of_layers`; `left_out` says which tokens are not looked at."""

    sequences: Sequences
    layers: int
    of_layers: int
    left_out: tuple[str, ...] = ()
    few: int = 0  # of the layers, those that have each kind among them

    def __str__(self) -> str:
        """What is not looked at; empty where all is."""
        layers = [f"layers {self.layers + 1} to {self.of_layers}"] * (self.layers < self.of_layers)
        return ", ".join([*layers, *self.left_out])

    def whole(self) -> "Excerpt":
        """The same sequences, through all layers."""
        return replace(self, layers=self.of_layers)

    def of(self, model):
        """The model cut to these layers, while the context lasts."""
        return first_layers(model, self.layers) if self.layers < self.of_layers else nullcontext()


def excerpt(
    model,
    own: Sequences,
    made: Sequences,
    way: str,
    run: Callable[[Sequences], float],
    seconds: float,
    steps: tuple[int, int] = (0, 0),
) -> Excerpt:
    """What of `own` sequences, of those `made` to be longer than a window, and of the layers fits into `seconds`.

    They are to be scored `way` ("tree" or "padded"); both outputs of a prompt stand beside each other. `run` takes
    sequences through the model, a row at a time, and says how long that took. Whole sequences come before all layers,
    since a window or a chunk shows in long ones alone, and two pairs of outputs before whole ones, since a tree needs
    several. `steps` are passes of one token that follow: with all layers, and with some.
    """
    every, total, few = own + made, 1, 1
    if _list_of_layers(model):
        total, few = len(_layers(model)), layers_of_each_kind(model)
    brief, on_cpu = [cut(own[0], 64), cut(own[0], 16)], next(model.parameters()).device.type == "cpu"
    try:
        with first_layers(model, few) if few < total else nullcontext():
            run(brief[on_cpu:])  # what is set up once, on an accelerator for each length
            long, short = (run([sequence]) for sequence in brief)
    except FAILURES:  # a class that isn't run in parts
        few, long, short = total, run(brief[:1]), run(brief[1:])
    lengths = [len(prompt) + len(output) for prompt, output in brief]
    a_token = max(long - short, 0.0) / max(1, lengths[0] - lengths[1])
    a_pass = max(short - lengths[1] * a_token, 0.0)
    config = model.config.get_text_config(decoder=True)
    a_layer = max(1, sum(map(_weights, _layers(model))) / total)
    head = _weights(model.get_output_embeddings()) / (a_layer * few)
    wide = 8 * (getattr(config, "hidden_size", None) or 0) / a_layer  # eager attention's share of a layer, times tokens

    def takes(chosen: Sequences, layers: int) -> float:
        rows = [len(prompt) + len(output) for prompt, output in chosen]
        # plain; with other rounding; then packed, which is no more, or padded, with all logits
        tokens = 2 * sum(row * (1 + wide * row) for row in rows)
        tokens += sum(rows) if way == "tree" else len(rows) * max(rows) * (1 + wide * max(rows) + head)
        passes = 2 * len(rows) + 4 + steps[layers < total]
        return layers / few * (a_pass * passes + a_token * tokens)

    two = own if len(own) <= 4 else own[:2] + own[-2:]
    longest = max(len(prompt) + len(output) for prompt, output in every)
    ways = [(every, total), (every, few), (two + made, few), (own, few), (two, few)]
    length = max(len(prompt) + len(output) for prompt, output in own)
    while length > LEAST:
        length = max(LEAST, length * 3 // 4)
        ways.append(([cut(sequence, length) for sequence in two], few))
    chosen, layers = next((way for way in ways if takes(*way) <= seconds), ways[-1])
    left = [f"{len(every) - len(chosen)} of {len(every)} sequences"] * (len(chosen) < len(every))
    reached = max(len(prompt) + len(output) for prompt, output in chosen)
    left += [f"tokens beyond {reached} of {longest}"] * (reached < longest)
    return Excerpt(chosen, layers, total, tuple(left), few)


def cut(sequence: tuple[list[int], list[int]], length: int) -> tuple[list[int], list[int]]:
    """A sequence of at most `length` tokens: its prompt's two ends and its output's beginning."""
    prompt, output = sequence
    output = output[: max(1, length // 2)]
    kept = max(1, length - len(output), length - length // 2) if len(prompt) + len(output) > length else len(prompt)
    kept = min(kept, max(1, length - length // 2))  # the same for both outputs of a prompt
    if len(prompt) > kept:
        prompt = prompt[: kept // 2] + prompt[len(prompt) - (kept - kept // 2) :]
    return prompt, output


def layers_of_each_kind(model) -> int:
    """How many of the first layers have every kind of layer among them; at least 2.

    Layers are alike that have the same modules, weights' shapes, settings and entry in the config's `layer_types`.
    """
    layers = _layers(model)
    types = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or [None] * len(layers)
    seen, needed = set(), 2
    for i, (layer, kind) in enumerate(zip(layers, types, strict=False)):
        found = (kind, *(_settings(name, module) for name, module in layer.named_modules()))
        if found not in seen:
            seen.add(found)
            needed = max(needed, i + 1)
    return min(needed, len(layers))


def _settings(name: str, module: torch.nn.Module) -> tuple:
    plain = (bool, int, float, str, type(None))
    number = lambda key, value: type(value) is int and ("idx" in key or key.startswith(("layer", "block")))
    own = {k: v for k, v in vars(module).items() if isinstance(v, plain) and not number(k, v)}
    shapes = [(k, tuple(p.shape)) for k, p in module.named_parameters(recurse=False)]
    return (name, type(module).__name__, repr(sorted(own.items())), repr(shapes))


@contextmanager
def first_layers(model, count: int):
    """The model with the first `count` of its layers, and its own embeddings, last norm and head."""
    holder, name = _list_of_layers(model)
    layers = getattr(holder, name)
    setattr(holder, name, layers[:count])
    try:
        yield
    finally:
        setattr(holder, name, layers)


@contextmanager
def in_fp32(model):
    """The model computing in fp32: a copy of what floating weights it has now, so of the first layers, not of all."""
    four, low = four_bit(model), _low(model)
    before = [tensor.data for tensor in low]
    kept = [(module.compute_dtype, module.support_avx512bf16_for_cpu) for module in four]
    products = torch.backends.cuda.matmul
    precision = products.fp32_precision
    try:
        products.fp32_precision = "ieee"  # --tf32 rounds what goes into a product to 10 bits
        for tensor in low:
            tensor.data = tensor.data.float()
        for module in four:
            module.compute_dtype, module.support_avx512bf16_for_cpu = torch.float32, False
        with torch.autocast(next(model.parameters()).device.type, enabled=False):
            yield
    finally:
        products.fp32_precision = precision
        for tensor, data in zip(low, before, strict=True):
            tensor.data = data
        for module, (dtype, kernel) in zip(four, kept, strict=True):
            module.compute_dtype, module.support_avx512bf16_for_cpu = dtype, kernel


def room_in_fp32(model) -> bool:
    """Whether `in_fp32` takes at most half of the memory that is free."""
    return 4 * sum(tensor.numel() for tensor in _low(model)) <= _free(model) / 2


def four_bit(model) -> list[torch.nn.Module]:
    """bitsandbytes' 4-bit layers; PEFT's around them have the same name."""
    named = (module for module in model.modules() if type(module).__name__ == "Linear4bit")
    return [module for module in named if hasattr(module, "compute_dtype")]


def _low(model) -> list[torch.Tensor]:
    """Its floating weights and buffers in another precision than fp32."""
    packed = {id(module.weight) for module in four_bit(model)}  # bits that are stored as if they were bf16
    floats = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point() and id(t) not in packed]
    return [tensor for tensor in floats if tensor.dtype != torch.float32]


def is_exact(model) -> bool:
    """Whether all of its weights are fp32 and it computes in it."""
    device = next(model.parameters()).device.type
    autocast = torch.is_autocast_enabled(device)
    return all(p.dtype == torch.float32 for p in model.parameters()) and not autocast and not rounds_products(device)


def rounds_products(device: str) -> bool:
    """Whether products of fp32 are computed in TF32 (`--tf32`)."""
    return device == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32"


def _list_of_layers(model) -> tuple[torch.nn.Module, str] | None:
    """The module that holds the layers of the decoder, and its name for them; None where they share what they make."""
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder or getattr(config, "num_kv_shared_layers", None):
        return None
    for module in model.get_decoder().modules():
        for name, child in module.named_children():
            if isinstance(child, torch.nn.ModuleList) and len(child) == config.num_hidden_layers > 2:
                return module, name
    return None


def _layers(model) -> list:
    found = _list_of_layers(model)
    return list(getattr(*found)) if found else [model]


def _weights(module) -> int:
    return 0 if module is None else sum(p.numel() for p in module.parameters())


def room_for(model, tokens: int, rows: int = 1) -> bool:
    """Whether eager attention over `rows` rows of so many tokens takes at most a quarter of the memory that is free."""
    heads = getattr(model.config.get_text_config(decoder=True), "num_attention_heads", None) or 1
    return rows * heads * tokens**2 * 12 <= _free(model) / 4


def _free(model) -> int:
    device = next(model.parameters()).device
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
