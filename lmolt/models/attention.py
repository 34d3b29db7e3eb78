"""Attention over a preference tree in a few batched calls, so that its cost doesn't grow with the row squared.

One boolean mask over the whole row makes every query meet every key, though most pairs belong to different sources.
Here the row is cut into tiles of `TILE` tokens; the queries of a tile meet their own tile and its ancestors, gathered
beside each other. Tiles alike in the number of keys share one SDPA call, at most `CALLS` a layer, whose shapes come
from a small book (`Shapes`): kernels that plan or compile a shape do so a few times a run. What is cut is cut on the
CPU (`cut`), and sent to the device in one copy.

FlexAttention (`flex`) computes the same from the row as it is, one block of 128 x 128 after the other, where a GPU
compiles it: no gathering, no padding. `measure` says which of the two is faster there.

It is registered with transformers as the attention `TREE`; without tiles it is plain attention (with the model's
sinks or soft cap, which SDPA doesn't know), so that the same model generates and scores padded rows.
"""

import functools
import math
import time
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

TREE = "lmolt_tree"
TILE = 64  # tokens; the fused kernels work on as many queries at a time
CALLS = 3
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


# --- cutting a tree into tiles, on the CPU


class Shapes:
    """A book of at most `limit` shapes (tiles, keys of each), from which the calls of a run are covered.

    It fills while batches come: a new shape is entered while there is room and the known ones would waste work.
    The same batches in the same order give the same shapes; `entries` goes into a checkpoint, so that a resumed run
    goes on with them, to the bit.
    """

    def __init__(self, limit: int = 8):
        self.limit = limit
        self.entries: list[tuple[int, int]] = []

    def cover(self, keys: list[int]) -> list[tuple[int, int]]:
        """Shapes for tiles that need so many `keys`, in descending order; the first shape takes the first tiles..."""
        exact = sum(keys)
        known = None
        for calls in range(1, CALLS + 1):
            known = self._cheapest(keys, calls, 0) or known
            if known and known[0] <= 1.4 * exact:
                return known[1]
        room = self.limit - len(self.entries)
        if room:
            found = self._cheapest(keys, CALLS, exact * 0.1 * (1 + len(self.entries)))
            new = [shape for shape in dict.fromkeys(found[1]) if shape not in self.entries]
            if len(new) <= room:
                self.entries += new
                return found[1]
        if known:
            return known[1]
        if all(entry[1] < keys[0] for entry in self.entries):  # an outlier, longer than all before it
            self.entries.append((4, TILE << math.ceil(math.log2(keys[0] / TILE))))
        plan, at = [], 0
        while at < len(keys):  # an outlier, larger than all before it: as many calls as it takes
            left = len(keys) - at
            fitting = [entry for entry in self.entries if entry[1] >= keys[at]]
            whole = [entry for entry in fitting if entry[0] >= left]
            plan.append(min(whole, key=math.prod) if whole else max(fitting))
            at += plan[-1][0]
        return plan

    def _cheapest(self, keys: list[int], calls: int, price: float) -> tuple[float, list[tuple[int, int]]] | None:
        """(products / TILE, shapes) of the cheapest cover in at most `calls`; at a `price`, by new shapes too."""
        best: list = [math.inf, None]
        sizes = [size for power in range(len(keys).bit_length() + 1) for size in (2**power, 3 * 2**power)]
        on_grid = [TILE * size for power in range(32) for size in (2**power, 3 * 2**power)]

        def go(at: int, cost: float, plan: list) -> None:
            left = len(keys) - at
            if left <= 0:
                best[:] = [cost, plan]
                return
            known = [entry for entry in self.entries if entry[1] >= keys[at]]
            new = []
            if price:
                width = min(size for size in on_grid if size >= keys[at])
                new = [(size, width) for size in sizes if size < 2 * left and (size, width) not in self.entries]
            for tiles, width in known + new:
                total = cost + tiles * width + (price if (tiles, width) in new and (tiles, width) not in plan else 0)
                if total < best[0] and (tiles >= left or len(plan) + 1 < calls):
                    go(at + tiles, total, [*plan, (tiles, width)])

        go(0, 0, [])
        return None if best[1] is None else tuple(best)


def cut(subtree_end: np.ndarray, shapes: Shapes) -> tuple[list[tuple[int, int]], dict[str, np.ndarray]]:
    """Cut a depth-first row into tiles: the shapes (B, K) of the calls, and index arrays for all of them in a row.

    `query` (sum of B x TILE) and `key` (sum of B x K) are positions in the row, `key_end` the end of the key's subtree,
    0 where a slot is empty; `place` (T,) is where the row's tokens stand among the queries. For `_Rows`: `key_order`
    from `key_from` on lists the slots that hold a token as key, `place` from `place_from` on its one query slot, and
    `filled` from `filled_from` on the token of a query slot, none for an empty one.
    """
    T = len(subtree_end)
    starts = np.arange(0, T, TILE)
    tiles = []
    for start in starts:
        seen = np.flatnonzero(subtree_end[:start] > start)
        tiles.append(np.concatenate([seen, np.arange(start, min(start + TILE, T))]))
    order = sorted(range(len(tiles)), key=lambda i: (-len(tiles[i]), i))
    calls = shapes.cover([len(tiles[i]) for i in order])
    query = np.zeros(sum(b for b, _ in calls) * TILE, np.int64)
    key = np.zeros(sum(b * k for b, k in calls), np.int64)
    key_end = np.zeros_like(key)
    real = np.zeros(len(query), bool)
    place = np.empty(T, np.int64)
    at_query = at_key = 0
    waiting = iter(order)
    for number, width in calls:
        for _ in range(number):
            tile = next(waiting, None)
            if tile is None:
                key_end[at_key] = 1  # an empty tile's queries are at position 0, and see the token there
            else:
                start, seen = starts[tile], tiles[tile]
                own = min(TILE, T - start)
                query[at_query : at_query + TILE] = start  # an empty slot sees what the tile's first token sees
                query[at_query : at_query + own] += np.arange(own)
                real[at_query : at_query + own] = True
                place[start : start + own] = np.arange(at_query, at_query + own)
                key[at_key : at_key + len(seen)] = seen
                key_end[at_key : at_key + len(seen)] = subtree_end[seen]
            at_query += TILE
            at_key += width
    held = np.flatnonzero(key_end)
    key_order = held[np.argsort(key[held], kind="stable")]
    counted = lambda numbers: np.concatenate([[0], np.cumsum(numbers)])
    return calls, {
        "query": query,
        "key": key,
        "key_end": key_end,
        "place": place,
        "place_from": np.arange(T + 1),
        "key_order": key_order,
        "key_from": counted(np.bincount(key[held], minlength=T)),
        "filled": query[real],
        "filled_from": counted(real),
    }


def flex_blocks(
    subtree_end: np.ndarray, depth: np.ndarray, window: int | None, chunk: int | None, size: int = 128
) -> dict[str, np.ndarray]:
    """FlexAttention's lists of key blocks for each block of queries, from the ranges of the tree: O((T / size)^2).

    `some` (n,) and `some_at` (n, n) number and list the blocks that a mask has to be looked at in, `all` and `all_at`
    those that every query of the block sees whole.
    """
    T = len(subtree_end)
    n = -(-T // size)
    padded = lambda values, with_: np.pad(values, (0, n * size - T), constant_values=with_).reshape(n, size)
    ends_last, ends_first = padded(subtree_end, 0).max(1), padded(subtree_end, T).min(1)
    shallow, deep = padded(depth, 1 << 40).min(1), padded(depth, 0).max(1)
    start = np.arange(n) * size
    query, key = np.arange(n)[:, None], np.arange(n)[None, :]
    seen = (key <= query) & (ends_last[key] > start[query])
    whole = (key < query) & (ends_first[key] >= np.minimum(start + size, T)[query])
    if window is not None:
        seen &= shallow[query] - deep[key] < window
        whole &= deep[query] - shallow[key] < window
    if chunk is not None:
        seen &= (shallow[query] // chunk <= deep[key] // chunk) & (deep[query] // chunk >= shallow[key] // chunk)
        whole &= (shallow[query] // chunk == deep[key] // chunk) & (deep[query] // chunk == shallow[key] // chunk)
    lists = {}
    for name, blocks in (("some", seen & ~whole), ("all", whole)):
        lists[name] = blocks.sum(1)
        lists[f"{name}_at"] = np.argsort(~blocks, axis=1, kind="stable")
    return lists


# --- on the device


@dataclass
class Tiles:
    """What the attention of each layer needs of a tree, on the device."""

    calls: list[tuple[int, int]]  # (B, K) of each
    index: dict[str, torch.Tensor]  # the arrays of `cut`
    depth: torch.Tensor  # (T,)
    kinds: list[tuple[int | None, int | None]]  # (window, chunk) of each kind of layer
    biases: dict = field(default_factory=dict)
    flex: list = field(default_factory=list)  # a BlockMask for each kind, where FlexAttention does it

    def bias(self, kind: int, dtype: torch.dtype, groups: int) -> list[torch.Tensor]:
        """(B, 1, TILE x groups, K) a call, 0 where the query sees the key, else -inf; made once, for all layers."""
        if (kind, dtype, groups) not in self.biases:
            (window, chunk), made, at = self.kinds[kind], [], [0, 0]
            for tiles, width in self.calls:
                query = self.index["query"][at[0] : at[0] + tiles * TILE].view(tiles, 1, TILE, 1)
                of_call = slice(at[1], at[1] + tiles * width)
                key, end = (self.index[name][of_call].view(tiles, 1, 1, width) for name in ("key", "key_end"))
                hidden = (key > query) | (query >= end)
                if window is not None:  # along one path, depth is the position that a window is counted in
                    hidden |= self.depth[query] - self.depth[key] >= window
                if chunk is not None:
                    hidden |= self.depth[query] // chunk != self.depth[key] // chunk
                bias = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)
                made.append(bias.repeat(1, 1, groups, 1))
                at = [at[0] + tiles * TILE, at[1] + tiles * width]
            self.biases[kind, dtype, groups] = made
        return self.biases[kind, dtype, groups]


class _Rows(torch.autograd.Function):
    """rows[index]: (N, C) from (T, C). Its gradient sums, for row t, the slots back[back_from[t] : back_from[t + 1]].

    A sum of rows a token is what an embedding bag computes: in one launch, in fp32, in an order that is always the
    same, where `index_add` would take turns (CPU) or atomic operations in bf16 (CUDA).
    """

    @staticmethod
    def forward(ctx, rows, index, back, back_from):
        ctx.save_for_backward(back, back_from)
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx, gradient):
        back, back_from = ctx.saved_tensors
        summed = torch.embedding_bag(gradient.contiguous(), back, back_from, include_last_offset=True)[0]
        return summed, None, None, None


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
        return _flex(query, key, value, tree_blocks.flex[kind], **kwargs), None
    heads, shared = query.shape[1], key.shape[1]
    groups = heads // shared
    index = tree_blocks.index
    rows = lambda x: x[0].transpose(0, 1).flatten(1)  # (T, heads x head size)
    queries = _Rows.apply(rows(query), index["query"], index["place"], index["place_from"])
    keys, values = (_Rows.apply(rows(x), index["key"], index["key_order"], index["key_from"]) for x in (key, value))
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
        out = _attend(q, k, v, bias, groups=groups, **kwargs)  # (B, shared, groups x TILE, head size)
        out = out.unflatten(2, (groups, TILE)).permute(0, 3, 1, 2, 4)
        outputs.append(out.reshape(tiles * TILE, heads * out.shape[-1]))
    out = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
    out = _Rows.apply(out, index["place"], index["filled"], index["filled_from"])
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


# --- FlexAttention


def block_mask(lists: dict[str, torch.Tensor], subtree_end, depth, window: int | None, chunk: int | None):
    """FlexAttention's mask of one kind of layer, from `flex_blocks`; all on the device, nothing is T x T."""
    from torch.nn.attention.flex_attention import BlockMask

    def sees(batch, head, query, key):
        seen = (key <= query) & (query < subtree_end[key])
        if window is not None:
            seen = seen & (depth[query] - depth[key] < window)  # not in place: Inductor can't lower that here
        if chunk is not None:
            seen = seen & (depth[query] // chunk == depth[key] // chunk)
        return seen

    of = lambda name: lists[name].to(torch.int32)[None, None]
    return BlockMask.from_kv_blocks(
        of("some"), of("some_at"), of("all"), of("all_at"), BLOCK_SIZE=128, mask_mod=sees, seq_lengths=(len(depth),) * 2
    )


@functools.cache
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def _flex(query, key, value, mask, *, scaling=None, dropout=0.0, s_aux=None, softcap=None, **_):
    """(1, T, heads, head size), compiled on a GPU; eager on a CPU, which has no backward pass."""
    from torch.nn.attention.flex_attention import flex_attention

    if dropout:
        raise ValueError("FlexAttention knows no dropout of attention weights; set the model's attention_dropout to 0")
    attention = _compiled_flex() if query.is_cuda else flex_attention
    capped = None if softcap is None else lambda score, *_: softcap * torch.tanh(score / softcap)
    out, lse = attention(
        query, key, value, score_mod=capped, block_mask=mask, scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1], return_lse=True,
    )  # fmt: skip
    if s_aux is not None:  # a key without value: it takes its share of each query's weight
        out = (out.float() * torch.sigmoid(lse - s_aux.view(1, -1, 1)).unsqueeze(-1)).to(out.dtype)
    return out.transpose(1, 2).contiguous()


def time_forms(
    tree, heads: int, shared: int, size: int, dtype: torch.dtype, forms=("tiles", "flex"), repeats: int = 5
) -> tuple[dict[str, float], dict[str, list[torch.Tensor]]]:
    """Seconds of one layer's attention on `tree.device`, forward and backward, in each form ("mask": one over the row).

    Medians of `repeats` after two passes that compile or plan; and each form's output and gradients for the same
    random numbers. On a CPU "flex" is a forward pass alone.
    """
    from lmolt.models.tree import attention_inputs  # which imports this file

    device = torch.device(tree.device)
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal, module.training = heads // shared, True, True
    T = len(tree.input_ids)
    draw = torch.Generator(device).manual_seed(0)
    make = lambda n: torch.randn(1, T, n, size, device=device, dtype=dtype, generator=draw).transpose(1, 2)
    inputs = [make(n) for n in (heads, shared, shared)]
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    timed, results = {}, {}
    for form in forms:
        differentiable = device.type != "cpu" or form != "flex"
        inputs = [x.detach().requires_grad_(differentiable) for x in inputs]
        if form == "mask":
            mask, blocks = torch.from_numpy(tree.attention_mask())[None, None].to(device), None
        else:
            with torch.no_grad():  # the shapes that training has are entered by training
                _, blocks = attention_inputs(tree, [(None, None)], form)
            mask = torch.empty(1, 1, 1, 1, dtype=torch.bool, device=device)
        took = []
        for _ in range(repeats + 2):
            wait()
            start = time.perf_counter()
            out = tree_attention(module, *inputs, mask, blocks, scaling=size**-0.5)[0]
            gradients = torch.autograd.grad(out.square().sum(), inputs) if differentiable else ()
            wait()
            took.append(time.perf_counter() - start)
        timed[form], results[form] = sorted(took[2:])[repeats // 2], [out.detach(), *gradients]
    return timed, results


def faster_form(model, tree) -> tuple[str, dict[str, float | str]]:
    """The faster of "tiles" and "flex" on `tree.device` for one layer of a model, and the ms of both.

    FlexAttention only where it was seen to be right on a GPU: full and sliding layers, without sinks, soft cap or
    dropout of weights; where it compiles; and where it gives the numbers of the tiles here and now.
    """
    config = model.config.get_text_config()
    unfit = [name for name in ("attn_logit_softcapping", "attention_dropout") if getattr(config, name, None)]
    unfit += ["sinks"] * any("sinks" in name for name, _ in model.named_parameters())
    unfit += ["attention_chunk_size"] * any(chunk for _, chunk in layer_kinds(config).values())
    if unfit:
        return "tiles", {"flex": f"not with the model's {', '.join(unfit)}"}
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    dtype = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    try:
        timed, results = time_forms(tree, heads, getattr(config, "num_key_value_heads", None) or heads, size, dtype)
    except Exception as error:  # whatever a compiler may say: the tiles do without it
        return "tiles", {"flex": f"{type(error).__name__}: {error}"[:200]}
    timed = {form: 1000 * seconds for form, seconds in timed.items()}
    for one, other in zip(*results.values(), strict=True):
        if not (one - other).norm() <= 0.02 * one.norm():
            return "tiles", timed | {"flex": "gives other numbers here"}
    return min(timed, key=timed.get), timed


AttentionInterface.register(TREE, tree_attention)
AttentionMaskInterface.register(TREE, sdpa_mask)
