"""The tree against the padded form: log-probabilities and gradients, several architectures, LoRA, checkpointing."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config

from lmolt.models.attention import TREE
from lmolt.models.tiles import Shapes
from lmolt.models.tree import build_tree, padded_logps, tree_logps

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPE = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE),
    "mistral": MistralConfig(**SHAPE, sliding_window=None),
    "mistral, window 40": MistralConfig(**SHAPE, sliding_window=40),
    "qwen2": Qwen2Config(**SHAPE),
}


def make_sequences(seed: int = 0, triples: int = 3, output: int = 100) -> list[tuple[list[int], list[int]]]:
    """Prompts that share an instruction; outputs that share a start; one repeated pair."""
    draw = torch.Generator().manual_seed(seed)
    ids = lambda n: torch.randint(3, 300, (n,), generator=draw).tolist()
    instruction, sequences = ids(20), []
    for i in range(triples):
        prompt, start = instruction + ids(15 + 4 * i), ids(6)
        sequences += [(prompt, start + ids(output - 7) + [2]), (prompt, start + ids(output - 20) + [2])]
    return [*sequences, sequences[0]]


def make_model(name: str, kind: str, attention: str):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation=attention)
    if kind != "full":
        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False))
    if kind == "lora, checkpointing":
        model.gradient_checkpointing_enable()
    return model.to(DEVICE).train()


@pytest.mark.parametrize("attention", [TREE, "sdpa"])
@pytest.mark.parametrize("kind", ["full", "lora", "lora, checkpointing"])
@pytest.mark.parametrize("name", CONFIGS)
def test_tree_equals_padded_rows(name, kind, attention):
    sequences, model = make_sequences(), make_model(name, kind, attention)
    weights = torch.linspace(-1, 1, len(sequences), device=DEVICE)
    packed, logps, gradients = build_tree(sequences).to(DEVICE), {}, {}
    for form in ("tree", "padded"):
        model.zero_grad()
        logps[form] = tree_logps(model, packed, 64) if form == "tree" else padded_logps(model, sequences)
        (logps[form] * weights).sum().backward()
        gradients[form] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert (logps["tree"] - logps["padded"]).abs().max() < 1e-4
    assert gradients["tree"].keys() == gradients["padded"].keys()
    for parameter, expected in gradients["padded"].items():
        assert (gradients["tree"][parameter] - expected).norm() <= 1e-4 * expected.norm(), parameter


def test_without_a_book_of_shapes_a_tree_rounds_alike_whatever_was_scored_before():
    """Else references would differ between a start that makes them and one that finds a part on disk."""
    model, book = make_model("llama", "full", TREE), Shapes()
    packed = build_tree(make_sequences()).to(DEVICE)
    long = build_tree([(prompt * 8, output) for prompt, output in make_sequences()]).to(DEVICE)
    with torch.no_grad():
        alone = tree_logps(model, packed)
        tree_logps(model, long, shapes=book)
        assert torch.equal(tree_logps(model, packed), alone)
        entries = list(book.entries)
        tree_logps(model, packed, shapes=book)
    assert entries and book.entries[: len(entries)] == entries


def test_a_head_of_a_derived_class_has_no_logits_either():
    """FSDP gives each module a class of its own, derived from the module's."""
    model = make_model("llama", "lora", TREE)
    head = model.get_output_embeddings()
    head.__class__ = type("FSDPLinear", (torch.nn.Linear,), {})
    shapes = []
    head.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape))
    tree = build_tree(make_sequences()).to(DEVICE)
    tree_logps(model, tree)
    assert shapes == [(1, len(tree.targets), 1)]
