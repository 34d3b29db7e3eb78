"""Attention over a preference tree, block by block, so that its cost doesn't grow with the square of the batch.

One boolean mask over the whole row makes every query meet every key, though most pairs belong to different sources.
Here the row is cut into blocks (a source with its outputs, say) whose queries meet only their own block and its
ancestors: the same numbers, from less work. It is registered with transformers as the attention `TREE`; without
blocks it is plain SDPA, so that the same model generates and scores padded rows.
"""

from dataclasses import dataclass

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

TREE = "lmolt_tree"


@dataclass
class Block:
    """Consecutive queries [start, end) that have the same ancestors before `start`."""

    start: int
    end: int
    ancestors: torch.Tensor  # (A,), positions in the row
    mask: torch.Tensor  # (1, 1, end - start, A + end - start), True where the query sees the key


def cut_into_blocks(subtree_end: torch.Tensor, mask: torch.Tensor, target: int = 128) -> list[Block]:
    """Cut a depth-first row into blocks of about `target` tokens; no block splits a chain or separates its ancestors.

    `subtree_end` is (T,) and `mask` (1, 1, T, T), both of lmolt/models/tree.py.
    """
    ends = subtree_end.tolist()
    ranges: list[tuple[int, int]] = []

    def split(start: int, end: int) -> None:
        """Cut the siblings that fill [start, end): small neighbours together, a large one into trunk and children."""
        at = start
        while at < end:
            stop = ends[at]
            if stop - at > target:
                trunk = at + 1
                while trunk < stop and ends[trunk] == stop:
                    trunk += 1
                ranges.append((at, trunk))
                split(trunk, stop)
            else:
                while stop < end and ends[stop] - at <= target:
                    stop = ends[stop]
                ranges.append((at, stop))
            at = stop

    split(0, len(ends))
    index = torch.arange(len(ends), device=subtree_end.device)
    blocks = []
    for start, end in ranges:
        ancestors = index[:start][subtree_end[:start] > start]
        seen = torch.cat([ancestors, index[start:end]])
        blocks.append(Block(start, end, ancestors, mask[:, :, start:end][:, :, :, seen]))
    return blocks


def tree_attention(module, query, key, value, attention_mask, tree_blocks: list[Block] | None = None, **kwargs):
    """Attention of a (1, heads, T, head size) row, one SDPA call a block; plain SDPA without blocks."""
    if tree_blocks is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    outputs = []
    for block in tree_blocks:
        own = slice(block.start, block.end)
        keys, values = (torch.cat([x[:, :, block.ancestors], x[:, :, own]], 2) for x in (key, value))
        outputs.append(sdpa_attention_forward(module, query[:, :, own], keys, values, block.mask, **kwargs)[0])
    return torch.cat(outputs, 1), None  # (1, T, heads, head size)


AttentionInterface.register(TREE, tree_attention)
AttentionMaskInterface.register(TREE, sdpa_mask)
