"""The preference tree: many (prompt, output) pairs in one packed row, each shared prefix computed once.

Prompts of one direction share their instruction, the outputs of one triple share their prompt, and outputs often
share their first words. Laid out as a prefix tree in depth-first order,

    [instruction][source 1][chosen 1][rejected 1][source 2][chosen 2][rejected 2] ...

each token attends to its ancestors and itself, and its position id is its depth, so that every output's
log-probability equals that of the padded form with one row an output (tests/test_tree.py). In depth-first order the
descendants of a token are contiguous: with `subtree_end[k]` the index after the last of them, query q sees key k if
and only if `k <= q < subtree_end[k]`.

Logits exist for scored positions only (those whose next token belongs to an output), `score_chunk` of them at a time.
"""

from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.nn import functional as F

from lmolt.models.attention import TREE, check_row, layer_kinds
from lmolt.models.flex import block_mask, flex_blocks
from lmolt.models.tiles import Shapes, Tiles, cut

IGNORED = -100


@dataclass
class Tree:
    """One packed row of T tokens that holds N sequences with S scored tokens, as arrays on the CPU."""

    input_ids: np.ndarray  # (T,)
    position_ids: np.ndarray  # (T,), depth in the tree
    subtree_end: np.ndarray  # (T,), index after the last descendant
    predictors: np.ndarray  # (S,), the position whose logits predict the scored token
    targets: np.ndarray  # (S,), the scored token
    members: np.ndarray  # (2, M): scored token members[0, m] belongs to sequence members[1, m]
    num_tokens: np.ndarray  # (N,), scored tokens of each sequence (the EOS counted, the prompt not)
    device: torch.device | str = "cpu"  # where it is to be scored

    def to(self, device) -> "Tree":
        """The tree, to be scored on `device`: `tree_logps` brings it there in one copy, with the attention's tiles."""
        return replace(self, device=device)

    def attention_mask(self, window: int | None = None, chunk: int | None = None) -> np.ndarray:
        """Boolean (T, T), True where the query (row) sees the key (column). For models without tiles, and tests."""
        index, depth = np.arange(len(self.subtree_end)), self.position_ids
        visible = (index[None, :] <= index[:, None]) & (index[:, None] < self.subtree_end[None, :])
        if window is not None:  # along one path, depth is the position that the window is counted in
            visible &= depth[:, None] - depth[None, :] < window
        if chunk is not None:
            visible &= depth[:, None] // chunk == depth[None, :] // chunk
        return visible


def build_tree(sequences: list[tuple[list[int], list[int]]]) -> Tree:
    """Pack (prompt ids, output ids) pairs; duplicates and shared prefixes are stored once.

    Neighbours in lexicographic order share the longest prefixes, so that sorting the sequences and storing of each
    what its predecessor lacks yields the prefix tree, depth first. `ValueError` on an empty prompt or output.

    For the prompt [1, 2] with the outputs [5, 6] and [5, 7]:

        input_ids     1  2  5  6  7
        position_ids  0  1  2  3  3     depth
        subtree_end   5  5  5  4  5     token i is seen by the tokens i to subtree_end[i] - 1
        predictors    1  2  2           positions that predict the scored tokens: the 5 once, for both
        targets       5  6  7
        members       [0, 1, 0, 2], [0, 0, 1, 1]     scored token, and the sequence that sums it
    """
    full = [prompt + output for prompt, output in sequences]
    for i, (prompt, output) in enumerate(sequences):
        if not prompt or not output:
            raise ValueError(f"sequence {i} has an empty {'output' if prompt else 'prompt'}; nothing can be scored")
    tokens: list[int] = []
    depth: list[int] = []
    subtree_end: list[int] = []
    parent_of_scored: list[int] = []
    scored_index: dict[int, int] = {}  # position in the row -> index among the scored tokens
    members: tuple[list[int], list[int]] = ([], [])
    path: list[int] = []  # positions in the row of the previous sequence's tokens, from the root
    previous: list[int] = []
    for i in sorted(range(len(full)), key=full.__getitem__):
        shared = _common_prefix(previous, full[i])
        for position in path[shared:]:
            subtree_end[position] = len(tokens)
        new = range(len(tokens), len(tokens) + len(full[i]) - shared)
        path = path[:shared] + list(new)
        tokens += full[i][shared:]
        depth += range(shared, len(full[i]))
        subtree_end += [-1] * len(new)
        for at in range(len(sequences[i][0]), len(full[i])):
            if path[at] not in scored_index:
                scored_index[path[at]] = len(scored_index)
                parent_of_scored.append(path[at - 1])
            members[0].append(scored_index[path[at]])
            members[1].append(i)
        previous = full[i]
    for position in path:
        subtree_end[position] = len(tokens)
    return Tree(
        input_ids=np.array(tokens),
        position_ids=np.array(depth),
        subtree_end=np.array(subtree_end),
        predictors=np.array(parent_of_scored),
        targets=np.array([tokens[position] for position in scored_index]),
        members=np.array(members),
        num_tokens=np.array([len(output) for _, output in sequences]),
    )


def tree_logps(
    model, tree: Tree, score_chunk: int | None = None, attention: str = "tiles", shapes: Shapes | None = None
) -> torch.Tensor:
    """Summed log-probability of each sequence's output, (N,) summed in float64, from one forward pass of `model`.

    `model` may be wrapped (DDP, DeepSpeed, FSDP, PEFT): the pass goes through its own `forward`. `score_chunk`
    positions have logits at one time; by default 1,024 on an accelerator (fewer passes over the head's weights than
    its memory is fast) and 256 on a CPU (whose caches they leave). `attention` is "tiles" or "flex"
    (lmolt/models/tiles.py, flex.py), the same numbers. `shapes` is the book that a run's tiles are covered from.
    Without one, how they are covered, and so the last bits, depend on this tree alone, not on what was scored before.
    """
    config = getattr(model, "module", model).config  # a DeepSpeed engine's own `config` is another
    text = config.get_text_config()
    device = torch.device(tree.device)
    kinds = layer_kinds(text)
    check_row(text, len(tree.input_ids))
    tiled = config._attn_implementation == TREE
    sent, tiles = attention_inputs(tree, list(kinds.values()), attention if tiled else None, shapes)
    inputs = {
        "input_ids": sent["input_ids"][None],
        "position_ids": sent["position_ids"][None],
        "logits_to_keep": sent["predictors"],
        "use_cache": False,
    }
    if tiled:
        inputs["tree_blocks"] = tiles
        # of no content: by its size the attention knows which mask the model chose for a layer
        masks = {kind: torch.empty(1, 1, 1, 1 + i, dtype=torch.bool, device=device) for i, kind in enumerate(kinds)}
    else:
        masks = {kind: torch.from_numpy(tree.attention_mask(*limits))[None, None] for kind, limits in kinds.items()}
        masks = {kind: mask.to(device) for kind, mask in masks.items()}
    inputs["attention_mask"] = masks if len(masks) > 1 else next(iter(masks.values()))
    if score_chunk is None:
        score_chunk = 256 if device.type == "cpu" else 1024
    head = _output_head(model)
    if _scales_logits(text) or type(head).forward is not torch.nn.Linear.forward:  # FSDP derives a class of its own
        scored = _gather_logps(model(**inputs).logits[0], sent["targets"])
    else:
        with _head_that_scores(head, sent["targets"], score_chunk):
            scored = model(**inputs).logits[0, :, 0]  # (S,), log-probabilities in the place of logits
    scored = scored.double()  # sums of a hundred terms near -6 lose 1e-4 in fp32, as much as a close margin
    total = scored.new_zeros(len(tree.num_tokens))
    return total.index_add(0, sent["members"][1], scored[sent["members"][0]])


def attention_inputs(
    tree: Tree, kinds: list, form: str | None, shapes: Shapes | None = None
) -> tuple[dict[str, torch.Tensor], Tiles | None]:
    """The tree's arrays on its device, (window, chunk) of each kind of layer given, and what the attention needs there.

    All that is cut or listed is so on the CPU, and one copy brings it to the device.
    """
    arrays = {name: value for name, value in vars(tree).items() if name != "device"}
    calls, names = [], ("some", "some_at", "all", "all_at")
    if form == "tiles":
        calls, index = cut(tree.subtree_end, shapes or Shapes())
        arrays |= index
    elif form == "flex":
        for i, limits in enumerate(kinds):
            lists = flex_blocks(tree.subtree_end, tree.position_ids, *limits)
            arrays |= {f"{name} {i}": lists[name] for name in names}
    sent = _send(arrays, torch.device(tree.device))
    if form is None:
        return sent, None
    tiles = Tiles(calls, sent, sent["position_ids"], kinds)
    if form == "flex":
        for i, limits in enumerate(kinds):
            of_kind = {name: sent[f"{name} {i}"] for name in names}
            tiles.flex.append(block_mask(of_kind, sent["subtree_end"], sent["position_ids"], *limits))
    return sent, tiles


def _send(arrays: dict[str, np.ndarray], device: torch.device) -> dict[str, torch.Tensor]:
    """Integer arrays as tensors on `device`, in one copy."""
    flat = torch.from_numpy(np.concatenate([array.ravel() for array in arrays.values()]).astype(np.int64, copy=False))
    if device.type == "cuda":
        flat = flat.pin_memory()  # else the copy would wait for the device
    parts = flat.to(device, non_blocking=True).split([array.size for array in arrays.values()])
    return {name: part.view(array.shape) for (name, array), part in zip(arrays.items(), parts, strict=True)}


def padded_logps(model, sequences: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    """The plain form of `tree_logps`: one right-padded row a sequence, all logits. (N,).

    It is what the tree is checked against, and what trains models whose attention takes no 4-D mask.
    """
    width = max(len(prompt) + len(output) for prompt, output in sequences)
    input_ids = torch.zeros(len(sequences), width, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED)
    for row, (prompt, output) in enumerate(sequences):
        length = len(prompt) + len(output)
        input_ids[row, :length] = torch.tensor(prompt + output)
        attention_mask[row, :length] = 1
        labels[row, len(prompt) : length] = torch.tensor(output)
    device = next(model.parameters()).device
    input_ids, attention_mask, labels = (x.to(device) for x in (input_ids, attention_mask, labels))
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    labels = labels[:, 1:]
    logps = _gather_logps(logits[:, :-1], labels.clamp(min=0))  # position t predicts token t + 1
    return (logps * (labels != IGNORED)).sum(-1, dtype=torch.float64)


def _common_prefix(a: list[int], b: list[int]) -> int:
    for at, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return at
    return min(len(a), len(b))


def _gather_logps(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = logits.float()
    return logits.gather(-1, targets[..., None])[..., 0] - logits.logsumexp(-1)


def _output_head(model) -> torch.nn.Module:
    while not hasattr(model, "get_output_embeddings"):
        model = model.module
    return model.get_output_embeddings()


def _scales_logits(config) -> bool:
    """Whether the model transforms its head's output (Gemma 2, Cohere, Granite), so that no head can score alone."""
    names = ("final_logit_softcapping", "logit_scale", "logits_scaling")
    return any(getattr(config, name, None) not in (None, 1, 1.0) for name in names)


@contextmanager
def _head_that_scores(head: torch.nn.Linear, targets: torch.Tensor, chunk: int):
    """Let `head` return the targets' log-probabilities (1, S, 1) instead of all logits (1, S, V).

    Its `forward` is exchanged and not the module, so that the hooks by which ZeRO-3 and FSDP gather its weight fire.
    """

    def score(hidden: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and head.weight.requires_grad:
            parts = [
                torch.utils.checkpoint.checkpoint(_linear_logps, h, head.weight, head.bias, t, use_reentrant=False)
                for h, t in zip(hidden[0].split(chunk), targets.split(chunk), strict=True)
            ]
            return torch.cat(parts)[None, :, None]
        return _FrozenHeadLogps.apply(hidden[0], head.weight, head.bias, targets, chunk)

    head.forward = score
    try:
        yield
    finally:
        del head.forward


def _linear_logps(hidden, weight, bias, targets):
    return _gather_logps(F.linear(hidden, weight, bias), targets)


class _FrozenHeadLogps(torch.autograd.Function):
    """log softmax(W h + b)[target] for a head that is not trained, without keeping its logits.

    With p = softmax(W h + b) the gradient is `d logp / d h = (onehot - p) W`, which the forward pass can compute
    while it holds a chunk's logits: what is kept is (S, H) instead of (S, V), and nothing is computed twice.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, chunk):
        need_gradient = ctx.needs_input_grad[0]
        logps = torch.empty(1, len(hidden), 1, dtype=torch.float32, device=hidden.device)  # no view: FSDP hooks on it
        gradient = torch.empty_like(hidden) if need_gradient else None
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            logits = F.linear(hidden[part], weight, bias).float()  # (chunk, V)
            logits -= logits.amax(1, keepdim=True)
            of_targets = logits.gather(1, targets[part, None])
            exponentials = logits.exp_()  # in place: passes over (chunk, V) are what this costs beside the products
            total = exponentials.sum(1, keepdim=True)
            logps[0, part] = of_targets - total.log()
            if need_gradient:
                # p - onehot before the cast: of a token near certain, bf16 would keep nothing of W[target] - p W
                exponentials.scatter_add_(1, targets[part, None], -total)
                gradient[part] = (exponentials.to(weight.dtype) @ weight) / -total
        if need_gradient:
            ctx.save_for_backward(gradient)
        return logps

    @staticmethod
    def backward(ctx, grad_logps):
        (gradient,) = ctx.saved_tensors
        return (grad_logps[0] * gradient).to(gradient.dtype), None, None, None, None
