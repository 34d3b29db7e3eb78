"""Folded adapters against PEFT's merge_and_unload: what LoraConfig can say is equal bit for bit, or refused by name."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from conftest import load_script
from peft import LoraConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from lmolt.merging import folding
from lmolt.merging.architecture import read_architecture
from lmolt.merging.checkpoints import Checkpoint
from lmolt.merging.verification import fold_by_peft

SMALL = {"vocab_size": 96, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
LLAMA = SMALL | {"intermediate_size": 48, "num_key_value_heads": 2}
T5 = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
FAMILIES = {  # class, config, names of a projection, the head, the embedding
    "llama": (LlamaForCausalLM, LlamaConfig(**LLAMA), "q_proj", "lm_head", "embed_tokens"),
    "gpt2": (GPT2LMHeadModel, GPT2Config(vocab_size=96, n_embd=32, n_head=4, n_layer=2), "c_proj", "lm_head", "wte"),
    "t5": (T5ForConditionalGeneration, T5Config(**T5), "q", "lm_head", "shared"),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config(**LLAMA, head_dim=8), "q_proj", "lm_head", "embed_tokens"),
    "mixtral": (MixtralForCausalLM, MixtralConfig(**LLAMA, num_local_experts=4), "q_proj", "lm_head", "embed_tokens"),
}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
COMPOSITE = Gemma3Config(  # a text model within one that reads images, too
    text_config=LLAMA | {"head_dim": 8},
    vision_config=VISION | {"image_size": 28, "patch_size": 14},
    image_token_index=60,
    mm_tokens_per_image=1,
)
ALL = {**FAMILIES, "gemma3": (Gemma3ForConditionalGeneration, COMPOSITE, "q_proj", "lm_head", "embed_tokens")}
Q, HEAD, EMBEDDING = "<a projection>", "<the head>", "<the embedding>"
FOLDED = {
    "plain": {"target_modules": [Q]},
    "all_linear_rslora": {"target_modules": "all-linear", "use_rslora": True},
    "dora": {"target_modules": [Q], "use_dora": True},
    "patterns": {"target_modules": "all-linear", "rank_pattern": {Q: 2}, "alpha_pattern": {rf".*1\..*{Q}": 3}},
    "layers_to_transform": {"target_modules": [Q], "layers_to_transform": [1]},
    "bias": {"target_modules": [Q], "bias": "all"},
    "embedding_saved": {"target_modules": [Q], "modules_to_save": [EMBEDDING]},
    "head_saved": {"target_modules": [Q], "modules_to_save": [HEAD]},
    "lora_on_head": {"target_modules": [Q, HEAD]},  # GPT-2: PEFT saves fan_in_fan_out false, for a square Conv1D
    "lora_on_both": {"target_modules": [Q, EMBEDDING, HEAD]},
    "dora_on_embedding": {"target_modules": [EMBEDDING], "use_dora": True},
    "bare_parameter": {"target_modules": [], "target_parameters": [f"{Q}.weight"]},
}
EXPERTS = {
    "both": {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    "one": {"target_parameters": ["experts.down_proj"], "alpha_pattern": {"experts.down_proj": 5}},
}


def filled(text, family: str):
    """`text` with the family's names for the projection, the head and the embedding."""
    for name, real in zip((Q, HEAD, EMBEDDING), ALL[family][2:], strict=True):
        text = text.replace(name, real)
    return text


def options_for(family: str, options: dict) -> dict:
    return json.loads(filled(json.dumps(options).replace("\\\\.", "@@"), family).replace("@@", "\\\\."))


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A function of a family's name: a folder with a random model of it, in bf16."""
    folder = tmp_path_factory.mktemp("bases")

    def base(family: str, dtype=torch.bfloat16) -> Path:
        kind, config, *_ = ALL[family]
        place = folder / f"{family}_{dtype}".replace("torch.", "")
        if not place.exists():
            torch.manual_seed(0)
            kind(config).to(dtype).save_pretrained(place)
        return place

    return base


def adapter(family: str, base: Path, folder: Path, make=LoraConfig, **options) -> Path:
    """An adapter of `base` whose trainable tensors have all been moved at random."""
    kind = ALL[family][0]
    task = "SEQ_2_SEQ_LM" if family == "t5" else "CAUSAL_LM"
    if make is LoraConfig:
        options = {"r": 4, "lora_alpha": 8} | options
    model = get_peft_model(kind.from_pretrained(base, dtype="auto"), make(task_type=task, **options))
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


def by_peft(family: str, base: Path, folder: Path, untied: list[str]) -> tuple[dict, torch.nn.Module]:
    """The tensors of PEFT's in-memory merge, and the unmerged model.

    PEFT adds to a tied tensor in place, and so changes its twin: as its own warning says, the base is untied first.
    """
    kind = ALL[family][0]
    unmerged = PeftModel.from_pretrained(kind.from_pretrained(base, dtype="auto"), folder)
    if untied:
        model = kind.from_pretrained(base, dtype="auto")
        model.config.tie_word_embeddings = False
        base = folder.parent / "untied"
        model.save_pretrained(base, state_dict={name: x.clone() for name, x in model.state_dict().items()})
    model = PeftModel.from_pretrained(kind.from_pretrained(base, dtype="auto"), folder)
    return model.merge_and_unload().state_dict(), unmerged


def fold(base: Path, folder: Path, family: str, output: Path) -> folding.Adapter:
    """The script, with --verify; what it wrote is at `output`."""
    load_script("merge").main([*map(str, ("--models", base, "--adapter", folder, "--output", output)), "--verify"])
    return folding.Adapter(folder, Checkpoint(base))


def logits(family: str, model) -> torch.Tensor:
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        return model.eval()(input_ids=ids, **({"decoder_input_ids": ids[:, :7]} if family == "t5" else {})).logits


def check_equal(family: str, base: Path, folder: Path, output: Path) -> None:
    """Fold; every tensor is PEFT's, --verify by PEFT's layers finds no difference, the logits are the model's."""
    loaded = fold(base, folder, family, output)
    expected, unmerged = by_peft(family, base, folder, loaded.untied)
    model = ALL[family][0].from_pretrained(output, dtype="auto")
    ours = model.state_dict()
    assert ours.keys() == expected.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name
    if family == "mixtral":  # a rounding may choose another expert
        return
    want = logits(family, unmerged).float()
    assert (logits(family, model).float() - want).abs().max() < 0.05 * want.abs().max()  # roundings of bf16


REFUSED_ON_T5 = {"embedding_saved", "head_saved", "lora_on_head", "lora_on_both", "dora_on_embedding"}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", FOLDED)
def test_as_peft_merges(bases, tmp_path, family, case):
    base = bases(family)
    folder = adapter(family, base, tmp_path / "adapter", **options_for(family, FOLDED[case]))
    if family == "t5" and case in REFUSED_ON_T5:
        with pytest.raises(ValueError, match="which a t5 shares between shared.weight, .*merge_and_unload"):
            fold(base, folder, family, tmp_path / "O")
        assert not (tmp_path / "O").exists()
    else:
        check_equal(family, base, folder, tmp_path / "O")


@pytest.mark.parametrize("case", ["all_linear_rslora", "head_saved"])
def test_a_composite_model(bases, tmp_path, case):
    """Gemma 3 with its vision tower: the file's names aren't the modules', the text model lies one level deeper."""
    base = bases("gemma3")
    check_equal(
        "gemma3",
        base,
        adapter("gemma3", base, tmp_path / "adapter", **options_for("gemma3", FOLDED[case])),
        tmp_path / "O",
    )


@pytest.mark.parametrize("case", EXPERTS)
def test_fused_experts(bases, tmp_path, case):
    """Stored one by one, trained as one parameter."""
    base = bases("mixtral")
    folder = adapter("mixtral", base, tmp_path / "adapter", target_modules=["q_proj"], **EXPERTS[case])
    check_equal("mixtral", base, folder, tmp_path / "O")


def test_a_float32_base_and_an_adapter_of_bfloat16(bases, tmp_path):
    base = bases("llama", torch.float32)
    folder = adapter("llama", base, tmp_path / "adapter", target_modules="all-linear")
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({name: x.bfloat16() for name, x in tensors.items()}, folder / "adapter_model.safetensors")
    check_equal("llama", base, folder, tmp_path / "O")


# --- every field of LoraConfig, every tuner

HARMLESS_VALUES = {  # folded as if it were not there
    **{"task_type": "CAUSAL_LM", "peft_type": "LORA", "auto_mapping": {"a": "b"}, "peft_version": "0.21.2"},
    **{"base_model_name_or_path": "some/base", "revision": "v1", "inference_mode": True, "r": 4},
    **{"target_modules": ["q_proj"], "exclude_modules": ["k_proj"], "lora_alpha": 8, "lora_dropout": 0.1},
    **{"fan_in_fan_out": True, "bias": "lora_only", "use_rslora": True, "modules_to_save": ["norm"]},
    **{"init_lora_weights": "orthogonal", "layers_to_transform": 1, "layers_pattern": "layers"},
    **{"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 2}, "megatron_core": "megatron.core"},
    **{"loftq_config": {"loftq_bits": 4}, "eva_config": {"rho": 2.0}, "corda_config": {}, "lora_ga_config": {}},
    **{"use_dora": True, "qalora_group_size": 8, "runtime_config": {}, "target_parameters": ["v_proj.weight"]},
}
REFUSED_VALUES = {
    **{"megatron_config": {"a": 1}, "trainable_token_indices": [1, 2], "velora_config": {"num_groups": 2}},
    **{"alora_invocation_tokens": [5], "use_qalora": True, "monteclora_config": {"num_samples": 2}},
    **{"layer_replication": [[0, 2], [1, 2]], "lora_bias": True, "use_bdlora": {"nblocks": 2}},
    **{"arrow_config": {"top_k": 2}, "kasa_config": {"beta": 1.0}, "ensure_weight_tying": True},
}


def test_every_field_is_decided_on():
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert HARMLESS_VALUES.keys() | REFUSED_VALUES.keys() == fields


def test_a_base_whose_config_gives_another_shape_is_refused(bases, tmp_path):
    base = tmp_path / "stale"
    shutil.copytree(bases("llama"), base)
    folder = adapter("llama", base, tmp_path / "adapter", r=4, target_modules=["q_proj"])
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 32}))
    message = rf"weight is \[{config['vocab_size']}, .* config.json makes it \[{config['vocab_size'] + 32},"
    with pytest.raises(ValueError, match=message):
        fold(base, folder, "llama", tmp_path / "out")


def change_config(folder: Path, **values) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | values))


IN_TRAINING = ("exclude_modules", "fan_in_fan_out", "bias", "use_rslora", "modules_to_save", "init_lora_weights")
IN_TRAINING += ("layers_to_transform", "rank_pattern", "alpha_pattern", "use_dora", "target_parameters")


@pytest.mark.parametrize("field", HARMLESS_VALUES)
def test_a_field_that_is_followed_or_does_no_harm(bases, tmp_path, field):
    base, value = bases("llama"), HARMLESS_VALUES[field]
    options = {"target_modules": ["q_proj"]} | ({field: value} if field in IN_TRAINING else {})
    folder = adapter("llama", base, tmp_path / "adapter", **options)
    expected, _ = by_peft("llama", base, folder, [])
    if field not in IN_TRAINING:
        change_config(folder, **{field: value})
    check_tensors(base, folder, expected)


def check_tensors(base: Path, folder: Path, expected: dict) -> None:
    """Each tensor of a fold without the script."""
    loaded = folding.Adapter(folder, Checkpoint(base))
    for name, job in loaded.jobs.items():
        pieces = []
        folding.fold_tensor(name, loaded, "original", job.entry.dtype, pieces.append)
        bits = torch.from_numpy(np.concatenate([piece.ravel() for piece in pieces])).view(expected[name].dtype)
        assert torch.equal(bits, expected[name].flatten()), name


@pytest.mark.parametrize("field", REFUSED_VALUES)
def test_a_field_that_changes_the_arithmetic_is_refused(bases, tmp_path, field):
    folder = adapter("llama", bases("llama"), tmp_path / "adapter", target_modules=["q_proj"])
    change_config(folder, **{field: REFUSED_VALUES[field]})
    with pytest.raises(ValueError, match=rf"adapter_config.json: {field} = .* is not supported; merge it with PEFT"):
        folding.Adapter(folder, Checkpoint(bases("llama")))


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "mica", "new"])
def test_an_initialisation_that_changes_the_base_is_refused(bases, tmp_path, init):
    folder = adapter("llama", bases("llama"), tmp_path / "adapter", target_modules=["q_proj"])
    change_config(folder, init_lora_weights=init)
    with pytest.raises(ValueError, match=f"init_lora_weights = '{init}' .*path_initial_model_for_weight_conversion"):
        folding.Adapter(folder, Checkpoint(bases("llama")))


@pytest.mark.parametrize("kind", sorted(str(kind.value) for kind in PEFT_TYPE_TO_CONFIG_MAPPING))
def test_another_tuner_is_refused_by_name(tmp_path, kind):
    assert peft.__version__.startswith("0.21")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind, "lora_alpha": 8}))
    if kind == "LORA":
        assert folding.read_config(tmp_path)["peft_type"] == "LORA"
    else:
        with pytest.raises(ValueError, match=f"{kind} is not supported, only LORA; merge it with PEFT"):
            folding.read_config(tmp_path)


def test_a_key_of_a_later_peft_is_refused_unless_it_is_off(bases, tmp_path):
    folder = adapter("llama", bases("llama"), tmp_path / "adapter", target_modules=["q_proj"])
    change_config(folder, use_novelty=None)
    folding.Adapter(folder, Checkpoint(bases("llama")))
    change_config(folder, use_novelty=True)
    with pytest.raises(ValueError, match=r"use_novelty = true \(which no PEFT up to 0.21 writes\) is not supported"):
        folding.Adapter(folder, Checkpoint(bases("llama")))


# --- names, blocks, 4 bits


def test_a_file_without_the_prefix_of_its_class(bases, tmp_path):
    """GPT-2 as the Hub has it: `h.0...`, no `transformer.`."""
    base = bases("gpt2")
    folder = adapter("gpt2", base, tmp_path / "adapter", target_modules=["c_attn"])
    expected, _ = by_peft("gpt2", base, folder, [])
    tensors = load_file(base / "model.safetensors")
    (tmp_path / "hub").mkdir()
    short = {name.removeprefix("transformer."): x for name, x in tensors.items()}
    save_file(short, tmp_path / "hub" / "model.safetensors")
    (tmp_path / "hub" / "config.json").write_bytes((base / "config.json").read_bytes())
    check_tensors(tmp_path / "hub", folder, {name.removeprefix("transformer."): x for name, x in expected.items()})


def test_rows_in_blocks_are_the_whole_products(bases, tmp_path, monkeypatch):
    """The streamed product: blocks of 64 rows and more, as in large models."""
    base = bases("llama")
    folder = adapter("llama", base, tmp_path / "adapter", target_modules=["lm_head", "up_proj"], r=64)
    expected, _ = by_peft("llama", base, folder, [])
    monkeypatch.setattr(folding, "BLOCK", 1 << 8)
    check_tensors(base, folder, expected)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_onto_the_dequantised_base(bases, tmp_path, family):
    """What 4-bit training saw: what bitsandbytes stores in 4 bits, quantised and back, then the adapter."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    from transformers.pytorch_utils import Conv1D

    base, q = bases(family), ALL[family][2]
    folder = adapter(family, base, tmp_path / "adapter", target_modules=[q])
    model = ALL[family][0].from_pretrained(base, dtype="auto")
    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, Conv1D)) and name != "lm_head" and not name.endswith(".wo"):
            turn = (lambda x: x.T.contiguous()) if isinstance(module, Conv1D) else lambda x: x
            state = quantize_4bit(turn(module.weight.data), quant_type="nf4", compress_statistics=True)
            module.weight.data = turn(dequantize_4bit(*state))
    expected = PeftModel.from_pretrained(model, folder).merge_and_unload().state_dict()
    load_script("merge").main(
        [*map(str, ("--models", base, "--adapter", folder, "--output", tmp_path / "O")), "--fold_base", "dequantised",
         "--verify"]
    )  # fmt: skip
    ours = ALL[family][0].from_pretrained(tmp_path / "O", dtype="auto").state_dict()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "kind, vocabulary, head, embedding, linear",
    [
        ("internlm2", "vocab_size", "output", "model.tok_embeddings", "model.layers.0.attention.wqkv"),
        ("chatglm4x", "padded_vocab_size", "transformer.output_layer", "transformer.word", "transformer.h.0.dense"),
    ],
)
def test_what_is_in_4_bits_where_the_class_is_not_known(tmp_path, kind, vocabulary, head, embedding, linear):
    """A base with code of its own: what has a row for each token is an embedding or a head, whatever its name."""
    save_file(
        {f"{name}.weight": torch.zeros(96 if name != linear else 32, 32) for name in (head, embedding, linear)},
        tmp_path / "model.safetensors",
    )
    auto = {"AutoModelForCausalLM": "modeling.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, vocabulary: 96, "auto_map": auto}))
    base = Checkpoint(tmp_path)
    found = read_architecture(base, {linear})
    assert found.model is None
    assert [name for name, e in base.entries.items() if found.is_quantised(name, e.shape)] == [f"{linear}.weight"]


def test_verify_reads_the_adapter_by_another_path(bases, tmp_path):
    """PEFT's own layers, one at a time: a fold that took another scale is seen."""
    base = Checkpoint(bases("llama"))
    folder = adapter("llama", bases("llama"), tmp_path / "adapter", target_modules=["q_proj"])
    name = "model.layers.0.self_attn.q_proj.weight"
    first = fold_by_peft(base, folder, "original", "BF16")(name)
    change_config(folder, lora_alpha=16)
    second = fold_by_peft(base, folder, "original", "BF16")(name)
    weight = np.concatenate(list(base.read(name, np.float64)))
    assert np.allclose(second - weight, 2 * (first - weight), atol=2e-3) and not np.array_equal(first, second)


# --- refusals


def change_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
REFUSED = {
    "homeless": (
        lambda folder: change_tensors(folder, lambda t: t.update({KEY.replace("q_proj", "w_pack"): t[KEY].clone()})),
        "w_pack.lora_A.weight .* finds no home in .*llama.*, which has no .*w_pack.weight; the adapter was trained on",
    ),
    "half": (lambda folder: change_tensors(folder, lambda t: t.pop(KEY)), "q_proj.lora_B.weight lacks its other half"),
    "shape": (
        lambda folder: change_tensors(folder, lambda t: t.update({KEY: t[KEY][:, :10].clone()})),
        r"q_proj adds 32 x 10 to \[32, 32\]",
    ),
    "rank": (
        lambda folder: change_tensors(folder, lambda t: t.update({KEY: t[KEY][:3].clone()})),
        r"factors \[3, 32\] and \[32, 4\] don't fit each other",
    ),
    "other_rank": (lambda folder: change_config(folder, r=8), "q_proj.lora_A.weight has rank 4, .* says 8"),
    "another_target": (lambda folder: change_config(folder, target_modules=["v_proj"]), "q_proj.*_A.* leaves out"),
    "another_layer": (lambda folder: change_config(folder, layers_to_transform=[1]), "layers.0.*_A.* leaves out"),
    "excluded": (lambda folder: change_config(folder, exclude_modules=r".*\.q_proj"), "q_proj.*_A.* leaves out"),
    "nan": (lambda folder: change_tensors(folder, lambda t: t[KEY].fill_(float("nan"))), "q_proj.* holds NaN"),
    "cut": (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"123"), "not a safetensors file"),
    "none": (lambda folder: (folder / "adapter_config.json").unlink(), "adapter_config.json: there is no such file"),
    "no_type": (lambda folder: change_config(folder, peft_type=None), "adapter_config.json: names no peft_type"),
    "list": (
        lambda folder: (folder / "adapter_config.json").write_text("[]"),
        "adapter_config.json: .* is not a JSON object",
    ),
    "cut_config": (
        lambda folder: (folder / "adapter_config.json").write_text('{"r": '),
        "adapter_config.json line 1 column 7: not JSON",
    ),
    "alpha": (
        lambda folder: change_config(folder, lora_alpha="x"),
        "alpha_pattern hold numbers, not 'x'",
    ),
    "flag": (lambda folder: change_config(folder, use_rslora="false"), 'use_rslora = "false" is not what PEFT writes'),
    "targets": (lambda folder: change_config(folder, target_modules=5), "target_modules = 5 is not what PEFT writes"),
    "layers": (lambda folder: change_config(folder, layers_to_transform=["0"]), "layers_to_transform = .* is not what"),
    "pattern": (lambda folder: change_config(folder, alpha_pattern={"[": 3}), r"alpha_pattern: '\[' is no pattern"),
    "not_saved": (lambda folder: change_config(folder, modules_to_save=["lm_head"]), "holds no lm_head, which modules"),
    "empty": (lambda folder: change_tensors(folder, dict.clear), "adapter_model.safetensors: holds no tensor"),
    "int8": (
        lambda folder: change_tensors(folder, lambda t: t.update({KEY: torch.ones(4, 32, dtype=torch.int8)})),
        "q_proj.lora_A.weight is of type I8; an adapter holds bf16, fp16 and fp32",
    ),
    "dora": (lambda folder: change_config(folder, use_dora=True), "use_dora and the stored magnitudes disagree"),
    "vocabulary": (
        lambda folder: change_tensors(
            folder, lambda t: t.update({"base_model.model.model.embed_tokens.weight": torch.zeros(100, 32)})
        ),
        r"brings a vocabulary of 100 .*has 96. Resize the base first, model.resize_token_embeddings\(100\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(bases, tmp_path, case):
    spoil, message = REFUSED[case]
    folder = adapter("llama", bases("llama"), tmp_path / "adapter", target_modules=["q_proj"])
    spoil(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        fold(bases("llama"), folder, "llama", tmp_path / "O")
    assert not list(tmp_path.glob("O*"))


def test_an_adapter_that_does_less_than_it_says_is_said(bases, tmp_path, capsys):
    folder = adapter("llama", bases("llama"), tmp_path / "adapter", target_modules=["q_proj"])
    change_tensors(folder, lambda t: [t.pop(KEY), t.pop(KEY.replace("lora_A", "lora_B"))])
    fold(bases("llama"), folder, "llama", tmp_path / "O")
    out = capsys.readouterr().out
    assert "targets model.layers.0.self_attn.q_proj (1 modules) of which" in out and "changes nothing" not in out
    change_tensors(folder, lambda t: [value.zero_() for value in t.values()])  # never trained
    fold(bases("llama"), folder, "llama", tmp_path / "P")
    assert "warning: the adapter changes nothing" in capsys.readouterr().out


def test_another_base_is_said(bases, tmp_path, capsys):
    folder = adapter("llama", bases("llama"), tmp_path / "adapter", target_modules=["q_proj"])
    change_config(folder, base_model_name_or_path="someone/other")
    fold(bases("llama"), folder, "llama", tmp_path / "O")
    assert "note: the adapter says it was trained on someone/other; it is folded into" in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "O")
