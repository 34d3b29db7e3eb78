"""Attention over a preference tree in a few batched calls, and which models can be given it.

It is registered with transformers as the attention `TREE`. It computes by tiles (tiles.py) or FlexAttention (flex.py),
the same numbers; without either it is plain attention (with the model's sinks or soft cap, which SDPA doesn't know), so
that the same model generates and scores padded rows.
"""

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lmolt.models.flex import flex
from lmolt.models.tiles import TILE, Rows, Tiles, gathered_again

TREE = "lmolt_tree"
FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"

# cuDNN's attention, first choice on an H100 from torch 2.11 on, plans each new shape for up to a second: ours are few,
# but a decoding step's keys grow by one. It has no part in anything that imports this file.
torch.backends.cuda.enable_cudnn_sdp(False)


# --- which models


def layer_kinds(config) -> dict[str, tuple[int | None, int | None]]:
    """The kinds of attention layers of a model, each with its (window, chunk) in tokens; `ValueError` if one has none.

    `config` is a text model's. A model without `layer_types` has one kind, windowed if it has a `sliding_window`.
    """
    kinds = {}
    for kind in sorted(set(getattr(config, "layer_types", None) or [])):
        if kind == FULL:
            kinds[kind] = (None, None)
        elif kind == SLIDING:
            kinds[kind] = (config.sliding_window, None)
        elif kind == CHUNKED:
            kinds[kind] = (None, config.attention_chunk_size)
        else:
            raise ValueError(f"its {kind} layers carry a state along the row, which would pass between branches")
    return kinds or {FULL: (getattr(config, "sliding_window", None), None)}


def why_not_tree(model: torch.nn.Module) -> str | None:
    """Why `model` (loaded with whatever attention) can't score a tree; None if nothing speaks against it."""
    config = model.config.get_text_config()
    if not model._supports_attention_backend:
        return "its class takes no attention function"
    if getattr(model, "_is_stateful", False):
        return "its layers carry a state along the row, which would pass between branches"
    try:
        layer_kinds(config)
    except ValueError as reason:
        return str(reason)
    if getattr(config, "alibi", False) or getattr(config, "position_embedding_type", None) == "alibi":
        return "its positions are biases of the row (ALiBi), not position ids"
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv1d) and "vision" not in name and "audio" not in name:
            return f"{name} is a convolution along the row, which would mix branches"
    return None


def check_row(config, tokens: int) -> None:
    """`ValueError` where a row of so many tokens meets what a model counts along the row, and not along a path."""
    scale = getattr(config, "floor_scale", None)
    if scale and getattr(config, "attn_temperature_tuning", False) and tokens >= scale:
        raise ValueError(
            f"{config.model_type} scales attention by the place in the row from {scale} tokens on, and this row has "
            f"{tokens}; set --tokens_per_batch below {scale}, or use --packing padded"
        )


# --- what a layer computes


def tree_attention(module, query, key, value, attention_mask, tree_blocks: Tiles | None = None, **kwargs):
    """Attention of a (1, heads, T, head size) row by its tiles; plain attention without them.

    Which kind of layer it is, the mask tells that the model chose for it: (1, 1, 1, 1 + number of the kind).
    """
    if kwargs.get("position_bias") is not None:
        raise ValueError(f"{type(module).__name__} adds a bias of positions, which {TREE} attention doesn't take")
    if tree_blocks is None:
        if kwargs.get("s_aux") is None and kwargs.get("softcap") is None:
            return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return _plain(module, query, key, value, attention_mask, **kwargs), None
    if attention_mask is None:
        raise ValueError(f"{type(module).__name__} was given no mask; it can't score a tree")
    kind = attention_mask.shape[-1] - 1
    if tree_blocks.flex:
        return flex(query, key, value, tree_blocks.flex[kind], **kwargs), None
    heads, shared = query.shape[1], key.shape[1]
    groups = heads // shared
    index = tree_blocks.index
    rows = lambda x: x[0].transpose(0, 1).flatten(1)  # (T, heads x head size)
    queries = Rows.apply(rows(query), index["query"], index["place"], index["place_from"])
    of_keys = [rows(key), rows(value)]
    keys, values = (Rows.apply(x, index["key"], index["key_order"], index["key_from"]) for x in of_keys)
    per_call = lambda x, sizes: x.split(sizes) if len(sizes) > 1 else [x]
    slots = [tiles * TILE for tiles, _ in tree_blocks.calls]
    held = [tiles * width for tiles, width in tree_blocks.calls]
    dtype = query.dtype
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
    biases = tree_blocks.bias(kind, dtype, groups)
    outputs = []
    for (tiles, _), q, k, v, bias in zip(
        tree_blocks.calls, per_call(queries, slots), per_call(keys, held), per_call(values, held), biases, strict=True
    ):
        # a group of query heads that share a key head stands as more queries of one head: no key is repeated
        q = q.view(tiles, TILE, shared, groups, -1).permute(0, 2, 3, 1, 4).flatten(2, 3)
        k, v = (x.view(tiles, -1, shared, x.shape[1] // shared).transpose(1, 2) for x in (k, v))
        with gathered_again({k: of_keys[0], v: of_keys[1]}, index["key"]):
            out = _attend(q, k, v, bias, groups=groups, **kwargs)  # (B, shared, groups x TILE, head size)
        out = out.unflatten(2, (groups, TILE)).permute(0, 3, 1, 2, 4)
        outputs.append(out.reshape(tiles * TILE, heads * out.shape[-1]))
    out = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
    out = Rows.apply(out, index["place"], index["filled"], index["filled_from"])
    return out.view(1, query.shape[2], heads, -1), None


def _attend(query, key, value, bias, *, groups=1, scaling=None, dropout=0.0, s_aux=None, softcap=None, **_):
    """SDPA of (B, heads, Q, d) with an additive bias, with a model's soft cap or sinks.

    `s_aux` (query heads,) are logits of a key without value. They enter as one more number of each query, its head's
    sink, that only one more key reads; `groups` query heads follow each other in Q.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if softcap is not None:
        logits = softcap * torch.tanh(query @ key.mT * (scaling / softcap)) + bias
        if s_aux is not None:
            raise ValueError("attention with both a soft cap and sinks is not known here")
        weights = F.dropout(logits.float().softmax(-1).to(value.dtype), dropout, dropout > 0)
        return weights @ value
    if s_aux is None:
        return F.scaled_dot_product_attention(query, key, value, bias, scale=scaling, dropout_p=dropout)
    width = value.shape[-1]
    sinks = (s_aux.to(query.dtype) / scaling).view(key.shape[1], groups, 1)
    sinks = sinks.expand(-1, -1, query.shape[2] // groups).reshape(1, key.shape[1], -1, 1)
    query = F.pad(torch.cat([query, sinks.expand(len(query), -1, -1, -1)], -1), (0, 7))  # kernels want sizes in eights
    reader = F.pad(
        key.new_ones(*key.shape[:2], 1, 1), (key.shape[-1], 7, 0, 7)
    )  # the key that reads the sink, 7 unseen
    key = torch.cat([F.pad(key, (0, 8)), reader], 2)
    value = F.pad(value, (0, query.shape[-1] - width, 0, 8))
    bias = torch.cat([bias, bias.new_zeros(*bias.shape[:3], 1), bias.new_full((*bias.shape[:3], 7), -torch.inf)], -1)
    return F.scaled_dot_product_attention(query, key, value, bias, scale=scaling, dropout_p=dropout)[..., :width]


def _plain(module, query, key, value, mask, **kwargs):
    """Padded rows and decoding of a model with sinks or a soft cap: (B, T, heads, head size)."""
    Q, K, groups = query.shape[2], key.shape[2], query.shape[1] // key.shape[1]
    if mask is None:
        index = torch.arange(K, device=query.device)
        mask = index[None, :] <= index[K - Q :, None]
    bias = mask
    if mask.dtype == torch.bool:
        bias = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
        bias = bias.masked_fill(~mask.any(-1, keepdim=True), 0)  # a padded query sees nothing: any number will do
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    bias = bias[..., :K].expand(len(query), -1, Q, K) if bias.dim() == 4 else bias.expand(len(query), 1, Q, K)
    return _attend(query, key, value, bias, **kwargs).transpose(1, 2).contiguous()


AttentionInterface.register(TREE, tree_attention)
AttentionMaskInterface.register(TREE, sdpa_mask)
