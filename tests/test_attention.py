"""Attention over trees: kinds of layers, sinks and soft caps against plain rows; what it asks of a device, counted."""

import contextlib
import random
import weakref
from collections import Counter

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig

from lmolt.models import attention
from lmolt.models import tree as tree_module
from lmolt.models.attention import TREE, why_not_tree
from lmolt.models.flex import flex_blocks
from lmolt.models.tiles import TILE, Shapes, cut
from lmolt.models.tree import build_tree, padded_logps, tree_logps

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPE = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
}
WINDOWS = {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CONFIGS = {
    "windows in some layers": ("Gemma3TextConfig", SHAPE | WINDOWS),
    "soft cap": ("Gemma2Config", SHAPE | WINDOWS | {"query_pre_attn_scalar": 16}),
    "sinks": ("GptOssConfig", SHAPE | WINDOWS | {"num_local_experts": 2, "num_experts_per_tok": 1}),
    "chunks": (
        "Llama4TextConfig",
        SHAPE | IDS | {"attention_chunk_size": 64, "intermediate_size_mlp": 96, "num_local_experts": 2}
        | {"layer_types": ["chunked_attention", "full_attention"]},
    ),
}  # fmt: skip


def sharp(model):
    """Weights drawn large, so that attention to a wrong token shows."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 or "sink" in name:
            torch.nn.init.normal_(parameter, std=1.0 if "sink" in name else 0.15)
    return model


def sequences_of(triples: int, draw: random.Random, instruction=95, source=(60, 110), output=(40, 90)):
    """(prompt, output) pairs under two instructions."""
    ids = lambda n: [draw.randrange(3, 300) for _ in range(n)]
    instructions = ids(instruction), ids(instruction)
    pairs = []
    for i in range(triples):
        prompt = instructions[i % 2] + ids(draw.randint(*source))
        pairs += [(prompt, ids(draw.randint(*output))), (prompt, ids(draw.randint(*output)))]
    return pairs


@pytest.mark.parametrize("name", CONFIGS)
def test_each_kind_of_layer_sees_what_it_sees_in_a_plain_row(name):
    config, arguments = CONFIGS[name]
    config = getattr(transformers, config)(**arguments)
    eager = sharp(AutoModelForCausalLM.from_config(config, attn_implementation="eager")).to(DEVICE)
    tree = AutoModelForCausalLM.from_config(config, attn_implementation=TREE).to(DEVICE)
    tree.load_state_dict(eager.state_dict())
    sequences = sequences_of(3, random.Random(0))
    truth = torch.cat([padded_logps(eager, [sequence]) for sequence in sequences])
    packed = tree_logps(tree, build_tree(sequences).to(DEVICE))
    assert (packed - truth).abs().max() < 1e-4
    assert (padded_logps(tree, sequences) - truth).abs().max() < 1e-4
    if DEVICE == "cuda" and name in ("soft cap", "chunks"):
        return  # torch 2.11 doesn't compile a soft cap, and `faster_form` chooses neither
    with torch.no_grad():
        assert (tree_logps(tree, build_tree(sequences).to(DEVICE), attention="flex") - truth).abs().max() < 1e-4
    gradients = []
    for model, logps in ((eager, truth), (tree, packed)):
        logps.sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert (gradients[1] - gradients[0]).norm() <= 1e-5 * gradients[0].norm()


def test_models_that_a_tree_does_not_fit_are_told():
    make = lambda config: AutoModelForCausalLM.from_config(config)
    assert why_not_tree(make(LlamaConfig(**SHAPE))) is None
    mamba = transformers.MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=1, state_size=4)
    assert why_not_tree(make(mamba)) is not None
    lfm2 = transformers.Lfm2Config(**SHAPE | IDS | {"layer_types": ["conv", "full_attention"]})
    assert "conv" in why_not_tree(make(lfm2))


def test_a_row_too_long_for_what_a_model_counts_along_it_is_refused():
    config, arguments = CONFIGS["chunks"]
    model = AutoModelForCausalLM.from_config(
        getattr(transformers, config)(**arguments, floor_scale=256), attn_implementation=TREE
    )
    tree_logps(model, build_tree(sequences_of(1, random.Random(0), instruction=5)))
    with pytest.raises(ValueError, match="from 256 tokens on, and this row has 3"):
        tree_logps(model, build_tree(sequences_of(1, random.Random(0))))


def test_cudnn_has_no_part_in_attention():
    assert not torch.backends.cuda.cudnn_sdp_enabled()


# --- what is asked of a device


NO_LAUNCH = {"view", "_unsafe_view", "t", "transpose", "slice", "expand", "unsqueeze", "squeeze", "detach", "permute"}
NO_LAUNCH |= {
    "alias",
    "select",
    "as_strided",
    "split",
    "split_with_sizes",
    "unbind",
    "empty",
    "empty_like",
    "new_empty",
}
SYNCHRONISES = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal"}


class Counting(TorchDispatchMode):
    """Operations that launch a kernel, those that wait for the device, buffers as long as the row, T x T masks."""

    def __init__(self, row: int):
        super().__init__()
        self.row, self.launches, self.waits, self.full, self.square = row, 0, 0, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = str(function).split(".")[1]
        self.launches += name not in NO_LAUNCH
        self.waits += name in SYNCHRONISES
        if name.startswith("index"):
            indices = args[1] if isinstance(args[1], (list, tuple)) else ()
            self.waits += any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)
        for tensor in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(tensor, torch.Tensor):
                shape = list(tensor.shape)
                self.square += shape.count(self.row) > 1
                self.full += "zeros" in name and self.row in shape
        return out


def counted(triples: int, layers: int) -> dict[str, tuple[Counting, Counting]]:
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE | {"num_hidden_layers": layers}, attn_implementation=TREE)
    lora = LoraConfig(r=8, target_modules="all-linear", lora_dropout=0.1)
    model = get_peft_model(AutoModelForCausalLM.from_config(config, attn_implementation=TREE), lora).train().to(DEVICE)
    tree = build_tree(sequences_of(triples, random.Random(0))).to(DEVICE)
    with Counting(len(tree.input_ids)) as forward:
        loss = tree_logps(model, tree).sum()
    with Counting(len(tree.input_ids)) as backward:
        loss.backward()
    return {"forward": forward, "backward": backward}


def test_launches_and_full_size_buffers_of_a_layer_do_not_grow_with_the_row():
    of_a_layer = {}
    for triples in (8, 64):
        one, two = counted(triples, 1), counted(triples, 2)
        for way in ("forward", "backward"):
            assert two[way].waits == 0
            assert two[way].square == 0
            of_a_layer[triples, way] = (
                two[way].launches - one[way].launches,
                two[way].full - one[way].full,
            )
    for way, most in (("forward", 110), ("backward", 170)):
        assert abs(of_a_layer[8, way][0] - of_a_layer[64, way][0]) <= 6, of_a_layer  # a call more or less
        assert of_a_layer[64, way][0] <= most, of_a_layer
        assert of_a_layer[64, way][1] <= 10, of_a_layer


@pytest.mark.parametrize("config", [SHAPE, SHAPE | {"num_key_value_heads": 4}], ids=["shared keys", "keys a head"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gathered_keys_are_not_kept_and_gradients_are_the_same_to_the_bit(monkeypatch, config, checkpointing):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**config), attn_implementation=TREE).to(DEVICE).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    tree = build_tree(sequences_of(4, random.Random(0), source=(60, 400))).to(DEVICE)
    attend, gathered = attention._attend, []

    def spy(query, key, value, *args, **kwargs):
        gathered.extend(weakref.ref(x._base if x._is_view() else x) for x in (key, value))
        return attend(query, key, value, *args, **kwargs)

    monkeypatch.setattr(attention, "_attend", spy)
    gradients, logps = [], []
    for keep in (False, True):
        if keep:
            monkeypatch.setattr(attention, "gathered_again", lambda *_: contextlib.nullcontext())
        scored = tree_logps(model, tree)
        if not keep:
            assert len(gathered) >= 8 and not any(ref() is not None for ref in gathered)
        scored.sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        logps.append(scored.detach())
        model.zero_grad()
    assert torch.equal(*logps)
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0 if DEVICE == "cpu" else 1e-5)


def test_one_copy_to_the_device(monkeypatch):
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE), attn_implementation=TREE)
    copies = []
    send = tree_module._send
    monkeypatch.setattr(tree_module, "_send", lambda *args: copies.append(1) or send(*args))
    monkeypatch.setattr(torch, "tensor", lambda *args, **kwargs: pytest.fail("made on the device"))
    tree_logps(model, build_tree(sequences_of(2, random.Random(0))))
    assert copies == [1]


@pytest.mark.parametrize(("window", "chunk"), [(None, None), (64, None), (None, 64)])
def test_flex_blocks_are_those_of_the_whole_mask(window, chunk):
    """Against the mask of T x T: a block that is said to be whole is, and no block with a visible pair is left out."""
    tree = build_tree(sequences_of(6, random.Random(0), source=(60, 400)))
    mask = tree.attention_mask(window, chunk)
    size = 32
    lists = flex_blocks(tree.subtree_end, tree.position_ids, window, chunk, size)
    n = len(lists["some"])
    assert lists["all"].sum() > 0
    looked_at = 0
    for i in range(n):
        some, whole = (set(lists[f"{name}_at"][i][: lists[name][i]]) for name in ("some", "all"))
        assert not some & whole
        looked_at += len(some)
        for j in range(n):
            block = mask[i * size : (i + 1) * size, j * size : (j + 1) * size]
            assert block.any() <= (j in some | whole)
            assert (j not in whole) or block.all()
    partial = sum(
        mask[i * size : (i + 1) * size, j * size : (j + 1) * size].any() for i in range(n) for j in range(n)
    ) - sum(lists["all"])
    assert looked_at <= 2 * partial  # little is looked at for nothing


def exact_products(ends: list[int], target: int = 128) -> int:
    """Products of blocks of about `target` tokens, none of which separates a chain from its ancestors."""
    ranges = []

    def split(start, end):
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
    before = np.array(ends)
    return sum((b - a) * (int((before[:a] > a).sum()) + b - a) for a, b in ranges)


@pytest.mark.parametrize("triples", [1, 8, 16])
def test_few_shapes_in_a_run_and_little_padding(triples):
    draw, shapes, seen, products, exact = random.Random(0), Shapes(), Counter(), 0, 0
    for _ in range(500 if triples == 1 else 100):
        ends = build_tree(sequences_of(triples, draw)).subtree_end
        calls, _ = cut(ends, shapes)
        seen.update(calls)
        products += sum(tiles * width for tiles, width in calls) * TILE
        exact += exact_products(ends.tolist())
    assert len(seen) <= 8
    assert products <= 1.6 * exact


def test_outliers_find_a_shape_too():
    """A book that is full meets a longer sequence, and then a larger tree: each tile still has its keys."""
    shapes, draw = Shapes(limit=2), random.Random(0)
    for triples, source in ((2, (60, 110)), (2, (700, 700)), (30, (60, 110))):
        tree = build_tree(sequences_of(triples, draw, source=source))
        calls, index = cut(tree.subtree_end, shapes)
        visible = tree.attention_mask()
        found, at_key, at_query = np.zeros_like(visible), 0, 0
        for tiles, width in calls:
            for _ in range(tiles):
                keys, ends = (index[name][at_key : at_key + width] for name in ("key", "key_end"))
                queries = index["query"][at_query : at_query + TILE]
                sees = (keys[None, :] <= queries[:, None]) & (queries[:, None] < ends[None, :])
                assert sees.any(1).all()  # else softmax over nothing is NaN
                rows, columns = np.nonzero(sees)
                found[queries[rows], keys[columns]] = True
                at_key, at_query = at_key + width, at_query + TILE
        assert (found == visible).all()
    assert len(shapes.entries) <= 4


def test_the_same_batches_give_the_same_shapes_from_an_entered_book():
    trees = [build_tree(sequences_of(n, random.Random(n))).subtree_end for n in (1, 5, 3, 9, 2, 7)]
    whole = Shapes()
    plans = [cut(ends, whole)[0] for ends in trees]
    half = Shapes()
    for ends in trees[:3]:
        cut(ends, half)
    resumed = Shapes()
    resumed.entries = [tuple(entry) for entry in half.entries]
    assert [cut(ends, resumed)[0] for ends in trees[3:]] == plans[3:]


def test_the_heads_gradient_of_a_token_near_certain_keeps_its_digits_in_bf16():
    """W[target] - p W cancels: formed after rounding p, it would be 10 % off (docs/performance.md)."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(2000, 64, generator=draw)
    target = torch.arange(32)
    hidden = weight[target] * 0.14  # logit 9 against a standard deviation of 1.1: p = 0.8
    got, expected = (h.requires_grad_() for h in (hidden.bfloat16(), hidden.bfloat16().double()))
    tree_module._FrozenHeadLogps.apply(got, weight.bfloat16(), None, target, 16).sum().backward()
    logits = expected @ weight.bfloat16().double().T
    logits.log_softmax(-1)[torch.arange(32), target].sum().backward()
    assert (got.grad.double() - expected.grad).norm() < 0.01 * expected.grad.norm()
