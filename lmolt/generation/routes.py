"""Which way of decoding.py a model is decoded by: what its cache allows, then what it is seen to get right."""

import math
import os
from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from accelerate.utils import broadcast_object_list

from lmolt.generation.decoding import Settings, decode, empty_cache, generate, read_prefix, takes
from lmolt.models.excerpt import FAILURES, SECONDS, Excerpt, excerpt, is_exact, room_for
from lmolt.models.self_check import (
    LONGEST,
    Comparison,
    exactly,
    inner_model,
    left_out,
    plain,
    seconds_of,
    takes_attention,
    use_eager,
    windows,
)

NEW, FEW = 32, 8  # tokens that are decoded to see whether a way is right; through some of the layers, fewer

_proven: WeakKeyDictionary = WeakKeyDictionary()  # model: {(way, whether rows exceed a window): it was right}


def possible(model, longest: int) -> list[str]:
    """The ways that the model's cache allows for rows of up to `longest` tokens, new ones included.

    A prefix needs keys and values alone: a state (convolution, SSM, linear attention) would run on over the padding
    behind it. In a sliding window or a chunk, whose slots count padding too, it fits rows no longer than that.
    """
    plainer = ["generate", "recompute"]
    if model.config.is_encoder_decoder:
        return ["batch", *plainer]
    if not takes(model, "past_key_values"):
        return plainer
    try:
        states = [type(layer).__name__ for layer in empty_cache(model).layers if "Linear" in type(layer).__name__]
    except (KeyError, AttributeError, TypeError, ValueError):  # its layers are of a kind that DynamicCache doesn't know
        return plainer
    prefix = not states and not inner_model(model)._is_stateful and takes(model, "position_ids")
    fits = all(longest <= window for window in windows(model.config))
    return ["prefix"] * (prefix and fits) + ["batch", *plainer]


def choose(model, rows: list[list[int]], prefix_length: int, settings: Settings, say: Callable, synced: bool) -> str:
    """The fastest way that is right for `rows`, whose first `prefix_length` tokens are the same.

    Ways are compared once a model, on the longest, the shortest and a middle row, with plain attention over what they
    decode; `say` tells where one is left out for its numbers. `ValueError` if none is right. Several processes
    (`synced`) take the first one's answer.
    """
    longest = max(map(len, rows))
    candidates = possible(model, longest + settings.max_new_tokens)
    if prefix_length == 0 and "prefix" in candidates:
        candidates.remove("prefix")
    if not settings.plain:
        candidates = ["generate", "recompute"]
    over = any(longest + settings.max_new_tokens > window for window in windows(model.config))
    known, part = _proven.setdefault(model, {}), None
    eager = [f"{way}, eager" for way in candidates] * takes_attention(type(inner_model(model)))
    for way in [*candidates, *eager]:
        if way in eager and model.config._attn_implementation != "eager":
            use_eager(model)
            say(f"{model.config.model_type}: decoded with its own eager attention")
        if (way, over) not in known:
            part = part or _part(model, rows, settings)
            known[way, over] = _is_right(model, way.split(",")[0], part, prefix_length, say)
        if known[way, over]:
            break
    right = [next((way.split(",")[0] for way in [*candidates, *eager] if known.get((way, over))), None)]
    if synced:
        broadcast_object_list(right)
    if right[0] is None:
        raise ValueError(
            f"{model.config.model_type}: no way of decoding gives what plain attention does on the same weights "
            f"({', '.join(candidates)}); this model can't be translated with here"
        )
    return right[0]


def _part(model, rows: list[list[int]], settings: Settings) -> Excerpt:
    """The longest, the shortest and a middle row, or what of them can be looked at in seconds; and, where rows will
    exceed a window that none of these does, the longest one again and again up to it."""
    ordered = sorted(rows, key=lambda row: (len(row), row))
    chosen = [ordered[i] for i in sorted({0, len(ordered) // 2, len(ordered) - 1})]
    longest, positions, made = ordered[-1], _positions(model), []
    for window in windows(model.config):
        length = window - FEW // 2
        reached = len(longest) + NEW <= window < len(longest) + settings.max_new_tokens
        if reached and length + NEW <= min(LONGEST, positions) and room_for(model, length):
            made.append((longest * (1 + length // len(longest)))[:length])
    output = lambda some: [(row, [1] * NEW) for row in some]
    timed = lambda some: seconds_of(model, some)
    seconds = SECONDS if is_exact(model) else SECONDS / 2
    return excerpt(inner_model(model), output(chosen), output(made), "padded", timed, seconds, (NEW, FEW))


def _positions(model) -> float:
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or math.inf


def _is_right(model, way: str, part: Excerpt, prefix_length: int, say: Callable) -> bool:
    """Whether a way gives what plain attention does; what some of the layers don't confirm, all of them decide.

    In bf16, fp16 and NF4 fp32 has the first word (lmolt/models/self_check.py).
    """
    quiet = lambda _: None
    if not is_exact(model):
        found = exactly(model, part, lambda few: _compare(model, way, few, prefix_length, FEW, quiet))
        if found is not None and not found.holds:
            say(f"in fp32, {found}; not used for this {model.config.model_type}")
            return False
    if part.layers < part.of_layers:
        with part.of(inner_model(model)):
            found = _compare(model, way, part, prefix_length, FEW, quiet)
        if found is not None and found.holds:
            say(f"self-check: {found}{left_out(part, model.config)}")
            return True
    found = _compare(model, way, part, prefix_length, NEW, say)
    if found is None:
        return False
    if found.holds:
        say(f"self-check: {found}{left_out(part.whole(), model.config)}")
    else:
        say(f"{found}; not used for this {model.config.model_type}")
    return found.holds


def _compare(model, way: str, part: Excerpt, prefix_length: int, new: int, say: Callable) -> Comparison | None:
    rows = [row for row, _ in part.sequences]
    prefix_length = min(prefix_length, len(os.path.commonprefix(rows)), min(map(len, rows)) - 1)
    room = _positions(model) - (0 if model.config.is_encoder_decoder else max(map(len, rows)))
    settings = Settings(max_new_tokens=max(1, min(new, room)))
    logps = [0.0] * len(rows)
    with torch.inference_mode():
        try:
            if way in ("generate", "recompute"):
                outputs = generate(model, [], rows, settings, logps=logps, use_cache=way == "generate")
            elif way == "batch":
                outputs = decode(model, [], rows, settings, [], logps=logps)
            else:
                cache = read_prefix(model, rows[0][:prefix_length])
                rest = [row[prefix_length:] for row in rows]
                options = {"prefix_cache": cache, "prefix_length": prefix_length, "logps": logps}
                outputs = decode(model, [], rest, settings, [], **options)
            known = plain(model, list(zip(rows, outputs, strict=True)))
        except torch.OutOfMemoryError:
            raise
        except (ValueError, *FAILURES) as error:
            say(f"decoding, {NAMES[way]}: {type(error).__name__}: {str(error)[:200]}")
            return None
        return known.compare(f"decoding, {NAMES[way]},", torch.tensor(logps))


NAMES = {
    "prefix": "behind a shared prefix",
    "batch": "padded",
    "generate": "by generate, rows of one length",
    "recompute": "by generate without a cache",
}
