"""A depth-first row cut into tiles, so that attention over a preference tree doesn't grow with the row squared.

One boolean mask over the whole row makes every query meet every key, though most pairs belong to different sources.
Here the row is cut into tiles of `TILE` tokens; the queries of a tile meet their own tile and its ancestors, gathered
beside each other. Tiles alike in the number of keys share one SDPA call, at most `CALLS` a layer, whose shapes come
from a small book (`Shapes`): kernels that plan or compile a shape do so a few times a run. What is cut is cut on the
CPU (`cut`), and sent to the device in one copy. lmolt/models/attention.py computes with them.
"""

import math
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

TILE = 64  # tokens; the fused kernels work on as many queries at a time
CALLS = 3


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
    0 where a slot is empty; `place` (T,) is where the row's tokens stand among the queries. For `Rows`: `key_order`
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


class Rows(torch.autograd.Function):
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


@contextmanager
def gathered_again(rows_of: dict[torch.Tensor, torch.Tensor], index: torch.Tensor):
    """Of each tensor given, a part of rows[index], the backward pass keeps its rows (T, C) and gathers it once more.

    A tile holds the keys of all its ancestors: in a row with one long sequence they are many times the row's own.
    Where someone else decides what is kept (activation checkpointing, offloading), it stays with that; and what is made
    of the tensors (a soft cap's products, keys with a sink) is kept as it is.
    """
    if not torch.is_grad_enabled() or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        yield
        return
    place = lambda x: (x.data_ptr(), x.shape, x.stride())
    known = {place(tensor): rows.detach() for tensor, rows in rows_of.items()}  # without the tensors: hooks live on

    def pack(saved: torch.Tensor):
        rows = known.get(place(saved))
        return saved if rows is None else (rows, saved.storage_offset(), saved.shape, saved.stride())

    def unpack(kept):
        if isinstance(kept, torch.Tensor):
            return kept
        rows, offset, shape, stride = kept
        width, numbers = rows.shape[1], shape.numel()
        part = index[offset // width : offset // width + numbers // width]
        return rows.index_select(0, part).as_strided(shape, stride)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
