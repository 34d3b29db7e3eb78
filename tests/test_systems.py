"""recipes/systems.yaml: each entry is whole; each architecture runs with its prompts on a tiny random model."""

import json
import math

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from lmolt.files import read_table, write_table
from lmolt.generation.systems import SYSTEMS, System, finish, load, read_system
from lmolt.generation.translate import translate
from lmolt.models.internlm2 import load_internlm2
from lmolt.prompts import CAP2MOL, DIRECTIONS, MOL2CAP, STYLES, build_prompt, encode_prompt

NAMES = list(yaml.safe_load(SYSTEMS.read_text()))


@pytest.mark.parametrize("name", NAMES)
def test_every_entry_is_whole(name):
    system = read_system(name)
    for direction in DIRECTIONS:
        assert system.models[direction].count("/") in (1, 2)
        assert build_prompt(direction, "CCO", system.prompt).count("CCO") == 1
    assert "licence" in system.needs and "GB" in system.needs
    if system.recipe:
        recipe = yaml.safe_load((SYSTEMS.parents[1] / system.recipe).read_text())
        assert recipe["output_dir"] == system.adapters[MOL2CAP] == system.adapters[CAP2MOL]
        assert recipe["model"] == system.models[CAP2MOL]


def test_prompts_are_those_of_the_cards():
    assert build_prompt(MOL2CAP, "CCO", "bare") == "CCO"
    assert build_prompt(MOL2CAP, "CCO", "text_chem") == "Caption the following molecule: CCO"
    assert build_prompt(CAP2MOL, "An alcohol.", "text_chem") == "Write in SMILES the described molecule: An alcohol."
    end = "### Input:\nCaption: X \nIn that caption, could you generate a molecule smile string?\n\n\n### Response:"
    assert build_prompt(CAP2MOL, "X", "meditron").endswith(end)
    assert all(set(style) == set(DIRECTIONS) for style in STYLES.values())
    chat = build_prompt(MOL2CAP, "CCO", "chem_llm")
    assert chat.count("<|im_start|>") == 3 and chat.endswith("CCO<|im_end|>\n<|im_start|>assistant\n")
    with pytest.raises(ValueError, match="unknown prompt style 'x'; use one of paper, bare"):
        build_prompt(MOL2CAP, "CCO", "x")


def test_mistakes(tmp_path):
    with pytest.raises(
        ValueError, match=r"no system 'molt5_larg' \(did you mean 'molt5_large'\?\): molt5_small, .*, slerp_cpo"
    ):
        read_system("molt5_larg")
    with pytest.raises(FileNotFoundError, match="none.yaml: there is no such file, here or in "):
        read_system("cpo", tmp_path / "none.yaml")
    entry = {"architecture": "t5", "parameters": 1, "download": 1, "licence": "mit", "prompt": "bare"}
    wrong = {
        "no model": (entry | {"both": {}}, "mol2cap .or both. is {}"),
        "no licence": ({"prompt": "bare", "both": {"model": "a/b"}}, "missing .*architecture.*licence"),
        "key": (entry | {"both": {"model": "a/b"}, "stopp": []}, "unknown: stopp"),
        "prompt": (entry | {"both": {"model": "a/b"}, "prompt": "bear"}, "prompt is 'bear'; use one of paper"),
    }  # fmt: skip
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({name: entry for name, (entry, _) in wrong.items()}))
    for name, (_, message) in wrong.items():
        with pytest.raises(ValueError, match=message):
            read_system(name, tmp_path / "s.yaml")


def test_a_system_that_cannot_be_loaded_says_what_it_needs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match="runs code that comes with AI4Chem/ChemLLM-7B-Chat.*--trust_remote_code.*15.5 GB"
    ):
        load(read_system("chem_llm"), MOL2CAP)
    with pytest.raises(
        FileNotFoundError, match="runs/paper/cpo is not there: cpo is trained with recipes/paper/cpo.yaml"
    ):
        load(read_system("cpo"), MOL2CAP)
    with pytest.raises(
        ValueError, match="(?s)Meditron7b.*54 GB of disk, about 13.5 GB of memory.*licence: none stated"
    ):
        load(read_system("meditron"), MOL2CAP)  # the tests have no Hub


def test_what_is_kept():
    chat = read_system("chem_llm")
    assert finish(chat, CAP2MOL, "Sure! It is `CC(=O)O`.<|im_end|>\nCCCCCCCCCCC") == "CC(=O)O"
    assert finish(chat, CAP2MOL, "C: CC(=O)O, not O") == "CC(=O)O"  # the longest word that is a molecule, not the first
    assert finish(chat, CAP2MOL, "Ask a chemist!") == "Ask a chemist!"
    assert finish(chat, MOL2CAP, "It is an acid. <|im_end|> CCO") == "It is an acid."
    assert finish(read_system("meditron"), CAP2MOL, " CC#N\n### Input: x") == "CC#N"


# --- a tiny random model of each architecture


@pytest.fixture(scope="session")
def tiny_t5(tiny_policy, tmp_path_factory):
    from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

    folder = tmp_path_factory.mktemp("t5")
    AutoTokenizer.from_pretrained(tiny_policy).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4, "vocab_size": 512}
    config = T5Config(**sizes, eos_token_id=2, decoder_start_token_id=0, initializer_factor=8.0)  # sharp: no near ties
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_internlm2(tiny_policy, tmp_path_factory):
    """The tiny Llama's weights in InternLM2's layout, with a tokenizer that needs code of the folder."""
    folder = tmp_path_factory.mktemp("internlm2")
    config = json.loads((tiny_policy / "config.json").read_text())
    keys = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
    keys += " max_position_embeddings rms_norm_eps bos_token_id eos_token_id pad_token_id"
    theirs = {key: config[key] for key in keys.split()}
    theirs |= {"model_type": "internlm", "rope_theta": 10000, "bias": False}
    theirs |= {"rope_scaling": {"type": "dynamic", "factor": 1.0}}
    theirs |= {"auto_map": {"AutoConfig": "configuration_internlm.InternLMConfig"}}
    (folder / "config.json").write_text(json.dumps(theirs))
    code = "from transformers import {0} as Base\n\n\nclass {1}(Base):\n    model_type = 'internlm'\n"
    classes = {
        "configuration": ("PreTrainedConfig", "Config"),
        "tokenization": ("PreTrainedTokenizerFast", "Tokenizer"),
    }
    for file, (base, own) in classes.items():
        (folder / f"{file}_internlm.py").write_text(code.format(base, f"InternLM{own}"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text((tiny_policy / name).read_text())
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer |= {"auto_map": {"AutoTokenizer": [None, "tokenization_internlm.InternLMTokenizer"]}}
    tokenizer |= {"tokenizer_class": "InternLMTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    weights = load_file(tiny_policy / "model.safetensors")
    fused = {"output.weight": weights["lm_head.weight"], "model.norm.weight": weights["model.norm.weight"]}
    fused["model.tok_embeddings.weight"] = weights["model.embed_tokens.weight"]
    names = {"attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj"}
    names |= {
        "feed_forward.w3": "mlp.up_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    for layer in range(2):
        for name, llamas in names.items():
            fused[f"model.layers.{layer}.{name}.weight"] = weights[f"model.layers.{layer}.{llamas}.weight"]
        q, k, v = (weights[f"model.layers.{layer}.self_attn.{part}_proj.weight"] for part in "qkv")
        rows = []  # each key-value head after the queries that use it
        for head in range(2):
            own = slice(16 * head, 16 * (head + 1))
            rows += [q[32 * head : 32 * (head + 1)], k[own], v[own]]
        fused[f"model.layers.{layer}.attention.wqkv.weight"] = torch.cat(rows)
    save_file(fused, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_internlm2_is_read_as_what_it_is(tiny_internlm2):
    """The logits are those of InternLM2's own equations, written out on its own tensors."""
    weights = load_file(tiny_internlm2 / "model.safetensors")
    ids = torch.tensor([[1, 5, 6, 7, 40, 41]])
    x, (T, d) = weights["model.tok_embeddings.weight"][ids[0]], (6, 16)
    norm = lambda x, w: x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * w
    angles = torch.outer(torch.arange(T), 10000 ** (-torch.arange(0, d, 2) / d)).repeat(1, 2)  # (T, d)
    rotate = lambda x: x * angles.cos() + torch.cat([-x[:, d // 2 :], x[:, : d // 2]], -1) * angles.sin()
    for layer in range(2):
        w = lambda name: weights[f"model.layers.{layer}.{name}.weight"]  # noqa: B023
        qkv = (norm(x, w("attention_norm")) @ w("attention.wqkv").T).view(T, 2, 4, d)
        heads = []
        for head in range(4):
            group = qkv[:, head // 2]
            scores = rotate(group[:, head % 2]) @ rotate(group[:, 2]).T / math.sqrt(d)
            scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
            heads.append(scores.softmax(-1) @ group[:, 3])
        x = x + torch.cat(heads, -1) @ w("attention.wo").T
        h = norm(x, w("ffn_norm"))
        x = (
            x
            + (torch.nn.functional.silu(h @ w("feed_forward.w1").T) * (h @ w("feed_forward.w3").T))
            @ w("feed_forward.w2").T
        )
    expected = norm(x, weights["model.norm.weight"]) @ weights["output.weight"].T
    torch.testing.assert_close(load_internlm2(str(tiny_internlm2), torch.float32)(ids).logits[0], expected)


def test_other_weights_are_no_internlm2(tiny_internlm2, tiny_policy, tmp_path):
    with pytest.raises(ValueError, match="is a 'llama', not an InternLM2"):
        load_internlm2(str(tiny_policy), torch.float32)
    (tmp_path / "config.json").write_text((tiny_internlm2 / "config.json").read_text())
    weights = load_file(tiny_internlm2 / "model.safetensors")
    save_file({key: weights[key] for key in weights if "layers.1.ffn_norm" not in key}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 weights are not .* model.layers.1.post_attention_layernorm.weight"):
        load_internlm2(str(tmp_path), torch.float32)


@pytest.mark.parametrize("name", ["molt5_large", "txtchem_t5", "txtchem_t5_translate", "chem_llm", "meditron", "cpo"])
def test_each_architecture_translates(name, tiny_t5, tiny_internlm2, tiny_policy):
    system = read_system(name)
    folder = str({"t5": tiny_t5, "internlm2": tiny_internlm2, "llama": tiny_policy}[system.architecture])
    system = system._replace(models=dict.fromkeys(DIRECTIONS, folder), adapters=dict.fromkeys(DIRECTIONS))
    for direction in DIRECTIONS:
        model, tokenizer = load(system, direction, trust_remote_code=system.trust_remote_code)
        prompts = [build_prompt(direction, source, system.prompt) for source in ("CCO", "CC(=O)O")]
        outputs = translate(model, tokenizer, prompts, max_new_tokens=8)
        assert outputs == [greedy(model, tokenizer, prompt, 8) for prompt in prompts]
        assert any(outputs)


@torch.no_grad()
def greedy(model, tokenizer, prompt, max_new_tokens):
    """One prompt, no cache, no padding: the most probable token, `max_new_tokens` times or to the end of sequence."""
    seq2seq, written = model.config.is_encoder_decoder, []
    read = torch.tensor([tokenizer(prompt)["input_ids"] if seq2seq else encode_prompt(tokenizer, prompt)])
    for _ in range(max_new_tokens):
        if seq2seq:
            start = torch.tensor([[model.config.decoder_start_token_id, *written]])
            logits = model(input_ids=read, decoder_input_ids=start).logits
        else:
            logits = model(torch.cat([read, torch.tensor([written], dtype=torch.long)], 1)).logits
        written.append(int(logits[0, -1].argmax()))
        if written[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(written, skip_special_tokens=True).strip()


def test_generation_ends_at_a_stop_that_is_one_token(tiny_policy):
    plain = System(
        "x", "llama", 1, 1, "mit", "paper", *[dict.fromkeys(DIRECTIONS, f) for f in (str(tiny_policy), None)]
    )
    prompts = [build_prompt(MOL2CAP, "CCO")]
    model, tokenizer = load(plain, MOL2CAP)
    first = model(torch.tensor([encode_prompt(tokenizer, prompts[0])])).logits[0, -1].argmax().item()
    assert translate(model, tokenizer, prompts, max_new_tokens=4) != [""]
    model, tokenizer = load(plain._replace(stop=(tokenizer.convert_ids_to_tokens(first),)), MOL2CAP)
    assert translate(model, tokenizer, prompts, max_new_tokens=4) == [""]


def test_evaluate_system(evaluate, tiny_t5, tiny_policy, tmp_path):
    """A model a direction, other prompts and files of systems: what `--system` is for."""
    entry = yaml.safe_load(SYSTEMS.read_text())["meditron"]
    entry |= {"mol2cap": {"model": str(tiny_t5)}, "cap2mol": {"model": str(tiny_policy)}}
    (tmp_path / "systems.yaml").write_text(yaml.safe_dump({"two": entry}))
    write_table([{"molecule": "C" * i, "caption": f"{i} carbons"} for i in range(1, 7)], tmp_path / "pairs.csv")
    evaluate("--system", "two", "--systems", tmp_path / "systems.yaml", "--pairs", tmp_path / "pairs.csv",
           "--max_new_tokens", 8, "--n_bootstrap", 10, "--no_fcd", "--output", tmp_path / "out")  # fmt: skip
    record = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert record["entry"]["prompt"] == "meditron" and record["entry"]["models"]["mol2cap"] == str(tiny_t5)
    rows = read_table(tmp_path / "out" / "predictions.parquet")
    assert [row["direction"] for row in rows] == ["mol2cap"] * 6 + ["cap2mol"] * 6
