"""Folded adapters against PEFT's merge_and_unload, bit for bit."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lmolt.merging import folding
from lmolt.merging.safetensors_io import Checkpoint

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "merge.py"


@pytest.fixture(scope="module")
def merge():
    """`main` of the script, in this process."""
    spec = importlib.util.spec_from_file_location("merge_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    first = sys.path[0]
    spec.loader.exec_module(module)
    sys.path[0] = first
    return lambda *argv: module.main([str(argument) for argument in argv])


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def base(request, tiny_policy, tmp_path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(tiny_policy, dtype=request.param)
    model.save_pretrained(tmp_path / "base", max_shard_size="200KB")
    return tmp_path / "base"


def adapter(base: Path, **options) -> Path:
    """A LoRA adapter of float32 whose factors are all drawn at random."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    options = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"} | options
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    torch.manual_seed(7)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)
    folder = base.parent / "adapter"
    model.save_pretrained(folder)
    return folder


def equal(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()
    assert ours.keys() == expected.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 32, "layers.1.mlp.up_proj": 3}},
        {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    ],
    ids=["plain", "rslora", "patterns", "modules_to_save"],
)
def test_as_peft_merges(merge, base, tmp_path, options):
    folder = adapter(base, **options)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), folder)
    merge("--models", base, "--adapter", folder, "--output", tmp_path / "O", "--verify")
    equal(tmp_path / "O", model.merge_and_unload().state_dict())
    ways = {row["how"] for row in json.loads((tmp_path / "O" / "merge.json").read_text())["tensors"].values()}
    assert ways == {"folded", "copied"} | ({"replaced"} if "modules_to_save" in options else set())


def test_a_bf16_adapter_too(merge, base, tmp_path):
    folder = adapter(base)
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({name: x.bfloat16() for name, x in tensors.items()}, folder / "adapter_model.safetensors")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), folder)
    merge("--models", base, "--adapter", folder, "--output", tmp_path / "O")
    equal(tmp_path / "O", model.merge_and_unload().state_dict())


def test_rows_in_blocks_are_the_whole_products(base, tmp_path, monkeypatch):
    """The streamed product: blocks of 64 rows and more, as in large models."""
    folder = adapter(base, r=64)
    monkeypatch.setattr(folding, "BLOCK", 1 << 12)
    checkpoint = Checkpoint(base)
    loaded, model = folding.Adapter(folder, checkpoint), AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    expected = PeftModel.from_pretrained(model, folder).merge_and_unload().state_dict()
    name, pieces = "model.layers.0.mlp.up_proj.weight", []
    dtype = checkpoint.entries[name].dtype
    folding.fold_tensor(name, checkpoint, loaded, "original", dtype, lambda piece: pieces.append(piece.copy()))
    assert len(pieces) == 2
    joined = torch.cat([torch.from_numpy(piece).flatten() for piece in pieces]).view(expected[name].dtype)
    assert torch.equal(joined, expected[name].flatten())


@pytest.mark.parametrize("base", [torch.bfloat16], indirect=True, ids=["bf16"])
def test_onto_the_dequantised_base(merge, base, tmp_path):
    """What 4-bit training saw: every linear weight but the head's, quantised and back, then the adapter."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    folder = adapter(base, target_modules=["q_proj"])
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.weight.data = dequantize_4bit(
                *quantize_4bit(module.weight.data, quant_type="nf4", compress_statistics=True)
            )
    expected = PeftModel.from_pretrained(model, folder).merge_and_unload().state_dict()
    merge("--models", base, "--adapter", folder, "--fold_base", "dequantised", "--output", tmp_path / "O", "--verify")
    equal(tmp_path / "O", expected)


# --- refusals


def change_config(folder: Path, **values) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | values))


def change_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
REFUSED = {
    "dora": (lambda folder: change_config(folder, use_dora=True), r"DoRA \(use_dora\) is not supported; fold it with"),
    "kind": (lambda folder: change_config(folder, peft_type="IA3"), "IA3 is not supported, only LORA"),
    "homeless": (
        lambda folder: change_tensors(folder, lambda t: t.update({KEY.replace("q_proj", "w_pack"): t[KEY].clone()})),
        "w_pack.lora_A.weight .* finds no home in .*base; the adapter was trained on",
    ),
    "half": (lambda folder: change_tensors(folder, lambda t: t.pop(KEY)), "q_proj.lora_B.weight lacks its other half"),
    "shape": (
        lambda folder: change_tensors(folder, lambda t: t.update({KEY: t[KEY][:, :10].clone()})),
        r"q_proj adds 64 x 10 to \[64, 64\]",
    ),
    "nan": (lambda folder: change_tensors(folder, lambda t: t[KEY].fill_(float("nan"))), "q_proj.* holds NaN"),
    "cut": (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"123"), "not a safetensors file"),
    "none": (lambda folder: (folder / "adapter_config.json").unlink(), "adapter_config.json: there is no such file"),
}


@pytest.mark.parametrize("base", [torch.bfloat16], indirect=True, ids=["bf16"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(merge, base, tmp_path, case):
    spoil, message = REFUSED[case]
    folder = adapter(base)
    spoil(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        merge("--models", base, "--adapter", folder, "--output", tmp_path / "O")
    assert not list(tmp_path.glob("O*"))
