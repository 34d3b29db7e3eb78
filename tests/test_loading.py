"""Loading: every weight where it belongs or an error that names it; attention that a class can take; adapters."""

import contextlib
import json
import pickle

import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from lmolt.models import loading
from lmolt.models.attention import TREE

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = SIZES | {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 128}


def save(folder, kind: str, **sizes):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**sizes))
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def llama(tmp_path):
    return save(tmp_path / "llama", "llama", **LLAMA)


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def load(folder):
    return loading.load_base(str(folder), dtype=torch.float32)


def test_weights_that_lack_are_named(llama):
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"has no weight for model.layers.2.input_layernorm.weight, .* \(9 in all\)"):
        load(llama)


def test_weights_without_a_place_are_named(llama):
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(
        ValueError, match=r"the model has no place for model.layers.1.input_layernorm.weight, .* \(9 in all"
    ):
        load(llama)


def test_weights_of_another_shape_are_named(llama):
    edit(llama, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(63, 32)}))
    with pytest.raises(
        ValueError, match=r"other shapes for lm_head.weight \[63, 32\] instead of \[64, 32\] \(1 in all\)"
    ):
        load(llama)


def test_buffers_that_nothing_loads_are_no_reason(llama):
    expected = load(llama)(torch.tensor([[3, 4, 5]])).logits
    edit(llama, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    assert torch.equal(load(llama)(torch.tensor([[3, 4, 5]])).logits, expected)


def test_damaged_weights(llama):
    file = llama / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="its weights are cut off or damaged"):
        load(llama)


def test_pickled_weights_are_tensors_or_refused(llama, tmp_path):
    ids = torch.tensor([[3, 4, 5]])
    expected = load(llama)(ids).logits
    torch.save(load_file(llama / "model.safetensors"), llama / "pytorch_model.bin")
    (llama / "model.safetensors").unlink()
    assert torch.equal(load(llama)(ids).logits, expected)

    class Code:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"lm_head.weight": Code()}, llama / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin holds more than tensors, so it isn't read"):
        load(llama)
    (llama / "pytorch_model.bin").write_bytes(pickle.dumps({"lm_head.weight": Code()}))  # torch's older format is bare
    with pytest.raises(ValueError, match="pytorch_model.bin holds more than tensors, so it isn't read"):
        load(llama)
    assert not (tmp_path / "ran").exists()


OWN_ATTENTION = {  # classes that don't take an attention function
    "bloom": {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "falcon": SIZES,
    "gptj": {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
}


@pytest.mark.parametrize("kind", ["llama", *OWN_ATTENTION])
def test_a_class_gets_the_attention_that_it_takes(kind, tmp_path):
    folder = save(tmp_path, kind, **OWN_ATTENTION.get(kind, LLAMA))
    model, ids = load(folder), torch.arange(3, 40)[None]
    assert model.config._attn_implementation == (TREE if kind == "llama" else "eager")
    expected = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")(ids).logits
    assert (model(ids).logits - expected).abs().max() < 1e-5


@pytest.mark.parametrize(("use_cpu", "where"), [(False, 3), (True, "cpu")])
@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_a_run_on_the_cpu_leaves_a_gpu_alone(llama, monkeypatch, use_cpu, where, load_in_4bit):
    """transformers would load NF4 to the first GPU, wherever the run computes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    asked = []
    monkeypatch.setattr(loading, "_load", lambda *_, **kwargs: asked.append(kwargs["device_map"]) or torch.nn.Module())
    with contextlib.suppress(ValueError):  # that module has no layer to quantise
        loading.load_base(str(llama), load_in_4bit=load_in_4bit, use_cpu=use_cpu)
    assert asked == [{"": where}]


@pytest.mark.parametrize(("slow", "computes"), [(True, torch.float32), (False, torch.bfloat16)])
def test_nf4_computes_in_what_the_processor_has(llama, monkeypatch, slow, computes):
    monkeypatch.setattr(loading, "bf16_is_slow", lambda: slow)
    computing = lambda dtype: {
        module.compute_dtype
        for module in loading.load_base(str(llama), load_in_4bit=True, dtype=dtype).modules()
        if type(module).__name__ == "Linear4bit"
    }
    assert computing(torch.float32) == {computes}
    assert computing(torch.bfloat16) == {torch.bfloat16} and computing(torch.float16) == {torch.float16}


def test_target_modules_with_commas(llama):
    options = {"r": 2, "alpha": 4, "dropout": 0.0}
    policy = loading.add_adapter(load(llama), None, target_modules="q_proj, v_proj", **options)
    adapted = {name.split(".")[-4] for name, _ in policy.named_parameters() if "lora_A" in name}
    assert adapted == {"q_proj", "v_proj"}


def test_experts_in_one_tensor_have_no_adapter_and_it_trains_with_dropout(tmp_path, capsys):
    folder = save(tmp_path, "mixtral", **LLAMA, num_local_experts=4, num_experts_per_tok=2)
    policy = loading.add_adapter(load(folder), None, r=2, alpha=4, dropout=0.1, target_modules="all-linear")
    assert capsys.readouterr().out == "adapter: on 8 linear layers, none on the experts (fused in one tensor a layer)\n"
    assert not policy.peft_config["default"].target_parameters
    policy.train()(torch.arange(3, 20)[None]).logits.sum().backward()
    gradients = [p.grad for name, p in policy.named_parameters() if "lora_B" in name]
    assert len(gradients) == 8 and all(g.abs().max() > 0 for g in gradients)


def test_a_router_that_is_a_linear_layer_of_its_own_kind_has_no_adapter(tmp_path):
    policy = loading.add_adapter(load(zoo.save_tiny("llama4_text", tmp_path)), None, r=2, alpha=4, dropout=0.1,
                                 target_modules="all-linear")  # fmt: skip
    assert not any("router" in name for name, _ in policy.named_parameters() if "lora_" in name)
    policy.train()(torch.arange(3, 20)[None]).logits.sum().backward()


def test_a_linear_layer_of_a_models_own_kind_that_gives_a_product_has_one(tmp_path):
    policy = loading.add_adapter(load(zoo.save_tiny("falcon", tmp_path)), None, r=2, alpha=4, dropout=0.1,
                                 target_modules="all-linear")  # fmt: skip
    assert sum("lora_A" in name for name, _ in policy.named_parameters()) == 4 * 4


def test_a_vision_tower_has_no_adapter(tmp_path, capsys):
    text = LLAMA | {"head_dim": 8, "vocab_size": 64}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision |= {"image_size": 28, "patch_size": 14}
    folder = save(
        tmp_path, "gemma3", text_config=text, vision_config=vision, image_token_index=60, mm_tokens_per_image=4
    )
    policy = loading.add_adapter(load(folder), None, r=2, alpha=4, dropout=0.1, target_modules="all-linear")
    adapted = [name for name, _ in policy.named_parameters() if "lora_A" in name]
    assert len(adapted) == 14 and all("language_model" in name for name in adapted)
    assert "on the 14 linear layers of the text model; 15 of other towers have none" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{ eos", r"generation_config.json line 1 column 3: not JSON"),  # transformers would make one up, in silence
        ('{"eos_token_id": "</s>"}', "generation_config.json: eos_token_id is '</s>', and neither a number nor"),
        ('{"eos_token_id": [2, "</s>"]}', "generation_config.json: eos_token_id is .*, and neither a number nor"),
    ],
)
def test_a_damaged_generation_config_is_named(llama, text, message):
    (llama / "generation_config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load(llama)


def test_a_padding_token_beyond_the_vocabulary_is_no_traceback(llama):
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | {"pad_token_id": 9999}))
    with pytest.raises(ValueError, match="can't be loaded: AssertionError Padding_idx must be within num_embeddings"):
        load(llama)
