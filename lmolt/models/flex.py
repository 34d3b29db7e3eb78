"""FlexAttention over a preference tree: what the tiles compute, from the row as it is.

One block of 128 x 128 after the other, where a GPU compiles it: no gathering, no padding. forms.py says which of the
two is faster there.
"""

import functools

import numpy as np
import torch


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


def flex(query, key, value, mask, *, scaling=None, dropout=0.0, s_aux=None, softcap=None, **_):
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
