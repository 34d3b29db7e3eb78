"""Every decoder class through loading, scoring, decoding and 4 bits, against plain eager attention, a row at a time.

`python tests/test_matrix.py` prints the matrix that docs/models.md carries.
"""

import random
import tempfile
from pathlib import Path

import pytest
import torch
import zoo
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES
from transformers.pytorch_utils import Conv1D

from lmolt.generation import routes
from lmolt.generation.decoding import Settings, decode, generate, read_prefix
from lmolt.models import attention, excerpt, loading, self_check, tree
from lmolt.models.tree import build_tree, padded_logps, tree_logps

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "models.md"
WITHIN = 1e-3  # nats a sequence
NEW = 24
_draw = random.Random(0)
_ids = lambda n: [_draw.randrange(3, zoo.VOCABULARY) for _ in range(n)]
INSTRUCTION, SEQUENCES = _ids(20), []
for extra in (8, 15, 22):  # prompts that share an instruction, outputs that share a start, all longer than the window
    prompt, start = INSTRUCTION + _ids(extra), _ids(4)
    SEQUENCES += [(prompt, start + _ids(30) + [2]), (prompt, start + _ids(14) + [2])]
PROMPTS = [prompt for prompt, _ in SEQUENCES[::2]]


def truth(model, prompt, output):
    """(log p(output | prompt), how far its tokens are below the likeliest at most), by one pass over one row."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + output]), use_cache=False).logits[0].double()
    logits = logits[len(prompt) - 1 : -1].log_softmax(-1)
    taken = logits.gather(1, torch.tensor(output)[:, None])[:, 0]
    return taken.sum().item(), (logits.amax(1) - taken).max().item()


def scores(model, way):
    with torch.no_grad():
        return tree_logps(model, build_tree(SEQUENCES)) if way == "tree" else padded_logps(model, SEQUENCES)


def decoded(model, way):
    settings, logps = Settings(max_new_tokens=NEW), [0.0] * len(PROMPTS)
    with torch.inference_mode():
        if way == "prefix":
            cache = read_prefix(model, INSTRUCTION)
            rows = [row[len(INSTRUCTION) :] for row in PROMPTS]
            options = {"prefix_cache": cache, "prefix_length": len(INSTRUCTION), "logps": logps}
            return decode(model, [], rows, settings, [], **options), logps
        if way == "batch":
            return decode(model, [], PROMPTS, settings, [], logps=logps), logps
        return generate(model, [], PROMPTS, settings, logps=logps, use_cache=way == "generate"), logps


def cell(kind: str, folder: Path) -> str:
    """The class's line of the matrix; an assertion fails where a way that is taken is wrong."""
    zoo.save_tiny(kind, folder)
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    expected = torch.tensor([truth(plain, *sequence)[0] for sequence in SEQUENCES], dtype=torch.float64)
    assert plain(torch.tensor([SEQUENCES[0][0]])).logits.std() >= 1, "too blunt to show an error"

    model, quiet = loading.load_base(str(folder), dtype=torch.float32), lambda _: None
    packing = self_check.choose_scoring(model, SEQUENCES, "tree", "cpu", torch.no_grad, quiet)
    assert (scores(model, packing) - expected).abs().max() < WITHIN
    assert (scores(model, "padded") - expected).abs().max() < WITHIN

    model = loading.load_base(str(folder), dtype=torch.float32)
    way = routes.choose(model, PROMPTS, len(INSTRUCTION), Settings(max_new_tokens=NEW), quiet, False)
    for prompt, output, logp in zip(PROMPTS, *decoded(model, way), strict=True):
        found, below = truth(plain, prompt, output)
        assert abs(logp - found) < WITHIN and below < WITHIN

    return f"| {kind} | {type(model).__name__} | {packing} | {way} | {in_nf4(folder, plain)} |"


def in_nf4(folder: Path, plain) -> str:
    """How NF4 is scored, its scores and what it decodes being those of `plain` with the same weights dequantised."""
    quiet = lambda _: None
    try:
        quantised = loading.load_base(str(folder), load_in_4bit=True, dtype=torch.float32)
        for module in filter(
            lambda module: isinstance(module, Linear4bit), quantised.modules()
        ):  # in fp32, since what bf16 rounds would hide what is wrong
            module.compute_dtype, module.support_avx512bf16_for_cpu = torch.float32, False
        packing = self_check.choose_scoring(quantised, SEQUENCES, "tree", "cpu", torch.no_grad, quiet)
    except ValueError as error:
        return "no linear layers" if "no linear layer" in str(error) else "refused"
    for name, module in quantised.named_modules():
        if isinstance(module, Linear4bit):
            weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
            own = plain.get_submodule(name)
            own.weight.data = (weight.T if isinstance(own, Conv1D) else weight).float()
    expected = torch.tensor([truth(plain, *sequence)[0] for sequence in SEQUENCES], dtype=torch.float64)
    assert (scores(quantised, packing) - expected).abs().max() < WITHIN
    assert (scores(quantised, "padded") - expected).abs().max() < WITHIN
    way = routes.choose(quantised, PROMPTS, len(INSTRUCTION), Settings(max_new_tokens=NEW), quiet, False)
    for prompt, output, logp in zip(PROMPTS, *decoded(quantised, way), strict=True):
        found, below = truth(plain, prompt, output)
        assert abs(logp - found) < WITHIN and below < WITHIN
    return packing


@pytest.mark.parametrize("kind", sorted(zoo.DECODERS))
def test_a_class_is_right_and_as_documented(kind, tmp_path):
    assert cell(kind, tmp_path) in DOCUMENT.read_text(encoding="utf-8").splitlines()


def test_every_class_is_in_the_matrix_or_left_out_for_a_reason():
    assert not set(zoo.DECODERS) & set(zoo.LEFT_OUT) and not (set(zoo.DECODERS) | set(zoo.LEFT_OUT)) - set(CLASSES)
    assert len(zoo.DECODERS) >= 45
    must = {"llama", "mistral", "qwen2", "qwen3", "phi3", "gpt2", "opt", "gpt_neox", "gemma2", "gemma3_text"}
    assert must <= set(zoo.DECODERS)
    document = DOCUMENT.read_text(encoding="utf-8")
    for kind in set(CLASSES) - set(zoo.DECODERS):
        assert f"`{kind}`" in document, f"{kind} is neither in docs/models.md nor among what it leaves out"


SEQ2SEQ = {
    "t5": {"tie_word_embeddings": False, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4},
    "mt5": {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4},
    **dict.fromkeys(("bart", "mbart"), {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128}),
}  # fmt: skip


@pytest.mark.parametrize("kind", SEQ2SEQ)
def test_an_encoder_decoder_is_decoded_right(kind, tmp_path):
    torch.manual_seed(0)
    ids = {"vocab_size": zoo.VOCABULARY, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    model = AutoModelForSeq2SeqLM.from_config(CONFIG_MAPPING[kind](**SEQ2SEQ[kind], **ids))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter) if parameter.ndim > 1 else parameter + 0.1)
    model.save_pretrained(tmp_path)
    model = loading.load_seq2seq(str(tmp_path))
    plain = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    way = routes.choose(model, PROMPTS, 0, Settings(max_new_tokens=NEW), lambda _: None, False)
    assert way == "batch"
    for prompt, output, logp in zip(PROMPTS, *decoded(model, way), strict=True):
        begun = torch.tensor([[0, *output[:-1]]])
        with torch.no_grad():
            logits = plain(input_ids=torch.tensor([prompt]), decoder_input_ids=begun).logits[0].double()
        logps = logits.log_softmax(-1).gather(1, torch.tensor(output)[:, None])
        assert abs(logps.sum().item() - logp) < WITHIN and logits.std() >= 1


# --- faults that are planted


def without_sinks(attend):
    return lambda *args, **kwargs: attend(*args, **kwargs | {"s_aux": None})


def one_window(kinds):
    return lambda config: dict.fromkeys(kinds(config), (zoo.WINDOW, None))


def off_by(kind: str, folder: Path, way: str) -> float:
    zoo.save_tiny(kind, folder)
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    expected = torch.tensor([truth(plain, *sequence)[0] for sequence in SEQUENCES], dtype=torch.float64)
    return (scores(loading.load_base(str(folder), dtype=torch.float32), way) - expected).abs().max().item()


def test_dropped_sinks_turn_a_cell_red(tmp_path, monkeypatch):
    assert off_by("gpt_oss", tmp_path / "a", "tree") < WITHIN
    monkeypatch.setattr(attention, "_attend", without_sinks(attention._attend))
    assert off_by("gpt_oss", tmp_path / "b", "tree") > 100 * WITHIN
    assert "| tree |" not in cell("gpt_oss", tmp_path / "c")


def test_one_window_for_all_layers_turns_a_cell_red(tmp_path, monkeypatch):
    assert off_by("gemma3_text", tmp_path / "a", "tree") < WITHIN
    monkeypatch.setattr(tree, "layer_kinds", one_window(attention.layer_kinds))
    assert off_by("gemma3_text", tmp_path / "b", "tree") > 100 * WITHIN
    assert "| tree |" not in cell("gemma3_text", tmp_path / "c")


@pytest.mark.parametrize("kind", ["lfm2", "granitemoehybrid", "qwen3_5_text"])
@pytest.mark.parametrize("seconds", [60.0, 0.0])
def test_a_state_that_leaks_between_branches_turns_a_cell_red(kind, seconds, tmp_path, monkeypatch):
    """Convolutions, a state space and linear attention, scored as a tree by force."""
    zoo.save_tiny(kind, tmp_path)
    model = loading.load_base(str(tmp_path), dtype=torch.float32)
    assert self_check.why_not_tree(model) is not None
    monkeypatch.setattr(self_check, "why_not_tree", lambda _: None)
    monkeypatch.setattr(tree, "layer_kinds", lambda _: {attention.FULL: (None, None)})
    assert off_by(kind, tmp_path, "tree") > 100 * WITHIN
    assert off_by(kind, tmp_path, "padded") < WITHIN
    said, options = [], {"seconds": seconds}
    packing = self_check.choose_scoring(model, SEQUENCES, "tree", "cpu", torch.no_grad, said.append, **options)
    assert packing == "padded" and "tree-packed scoring differs from plain attention on" in said[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [2, 200])
def test_what_rounding_could_hide_is_seen_in_fp32(dtype, length, tmp_path, monkeypatch):
    """Whole nats of a long sequence, which bf16's rounding explains here, and outputs of two tokens."""
    sequences = [(prompt, _ids(length) + [2]) for prompt in PROMPTS for _ in "ab"]

    def packing(kind):
        model, said = loading.load_base(str(zoo.save_tiny(kind, tmp_path / kind)), dtype=dtype), []
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        found = self_check.choose_scoring(model, sequences, "tree", "cpu", torch.no_grad, said.append)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert all(tensor.dtype == before[name].dtype for name, tensor in model.state_dict().items())
        return found, said[0]

    for kind in ("llama", "gpt_oss", "gemma3_text", "phi3"):
        assert packing(kind)[0] == "tree", f"{kind} is right and is not taken"
    monkeypatch.setattr(attention, "_attend", without_sinks(attention._attend))
    found, line = packing("gpt_oss")
    assert found == "padded" and line.startswith("self-check: in fp32, tree-packed scoring differs from plain")
    monkeypatch.setattr(self_check, "why_not_tree", lambda _: None)
    monkeypatch.setattr(tree, "layer_kinds", lambda _: {attention.FULL: (None, None)})
    assert packing("lfm2")[0] == "padded"


def test_fp32_has_the_first_word_under_an_adapter_on_nf4_too(tmp_path, monkeypatch):
    base = loading.load_base(str(zoo.save_tiny("gemma3_text", tmp_path)), load_in_4bit=True, dtype=torch.bfloat16)
    policy = loading.add_adapter(base, None, r=2, alpha=4, dropout=0.0, target_modules="all-linear")
    part = excerpt.Excerpt(SEQUENCES, 4, 4)
    found = self_check.exactly(policy, part, lambda few: self_check._look(policy, few, "tree", "cpu"))
    assert found.holds and found.allowed < 0.1
    monkeypatch.setattr(tree, "layer_kinds", one_window(attention.layer_kinds))
    said = []
    packing = self_check.choose_scoring(policy, SEQUENCES, "tree", "cpu", torch.no_grad, said.append)
    assert packing == "padded" and said[0].startswith("self-check: in fp32, tree-packed scoring differs from plain")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_rounding_could_hide_in_decoding_is_seen_in_fp32(dtype, tmp_path, monkeypatch):
    def way(kind):
        model, said = loading.load_base(str(zoo.save_tiny(kind, tmp_path / kind)), dtype=dtype), []
        settings = Settings(max_new_tokens=NEW)
        return routes.choose(model, PROMPTS, len(INSTRUCTION), settings, said.append, False), said

    ways = {"llama": "prefix", "gpt_oss": "batch", "lfm2": "batch"}
    assert {kind: way(kind)[0] for kind in ways} == ways
    monkeypatch.setattr(attention, "_attend", without_sinks(attention._attend))
    found, said = way("gpt_oss")
    assert said[0].startswith("in fp32, decoding, padded, differs from plain attention")
    assert "gpt_oss: decoded with its own eager attention" in said and found == "batch"
    monkeypatch.setattr(routes, "read_prefix", lambda model, prefix: read_prefix(model, prefix[::-1]))
    found, said = way("llama")
    assert said[0].startswith("in fp32, decoding, behind a shared prefix, differs from") and found == "batch"


def test_tf32_is_a_precision_of_its_own_and_off_where_fp32_is_meant():
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    try:
        products.fp32_precision = "tf32"  # what --tf32 sets
        assert excerpt.rounds_products("cuda") and not excerpt.rounds_products("cpu")
        with excerpt.in_fp32(torch.nn.Linear(2, 2)):
            assert products.fp32_precision == "ieee"
        assert products.fp32_precision == "tf32"
    finally:
        products.fp32_precision = before


FAULTS = {  # with no time for more than a part: each is seen in it
    "gpt_oss": lambda patch: patch.setattr(attention, "_attend", without_sinks(attention._attend)),
    "gemma3_text": lambda patch: patch.setattr(tree, "layer_kinds", one_window(attention.layer_kinds)),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_part_of_layers_and_sequences_shows_a_fault(kind, tmp_path, monkeypatch):
    zoo.save_tiny(kind, tmp_path, layers=8)
    model, said = loading.load_base(str(tmp_path), dtype=torch.float32), []
    options = {"seconds": 0.0}
    check = lambda: self_check.choose_scoring(model, SEQUENCES, "tree", "cpu", torch.no_grad, said.append, **options)
    assert check() == "tree"
    (line,) = said
    assert "tree-packed scoring equals plain attention on 4 sequences of up to 48 tokens" in line
    assert line.endswith("left out, to take no longer: layers 3 to 8, 2 of 6 sequences, tokens beyond 48 of 77")
    FAULTS[kind](monkeypatch)
    assert check() == "padded"
    assert "tree-packed scoring differs from plain attention on 4 sequences" in said[1]


if __name__ == "__main__":
    print("| model_type | class | scoring | decoding | NF4 |", "|---|---|---|---|---|", sep="\n")
    for name in sorted(zoo.DECODERS):
        with tempfile.TemporaryDirectory() as place:
            try:
                print(cell(name, Path(place)), flush=True)
            except Exception as error:  # a cell that is red; the others are shown all the same
                print(f"| {name} | {type(error).__name__}: {' '.join(str(error).split())[:200]} |", flush=True)
    reasons = zoo.LEFT_OUT | dict.fromkeys(set(CLASSES) - set(zoo.DECODERS) - set(zoo.LEFT_OUT), zoo.OTHERS)
    print("\nLeft out of transformers' causal LMs:\n")
    for reason in sorted(set(reasons.values()), key=lambda reason: -list(reasons.values()).count(reason)):
        print(f"- {reason}: {', '.join(f'`{kind}`' for kind in sorted(reasons) if reasons[kind] == reason)}")
