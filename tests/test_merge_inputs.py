"""Inputs of a merge as a loader sees them: which file, which tensors, what is tied, what equal shapes mean."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from lmolt.files import content_hash
from lmolt.merging.beside import files_to_copy
from lmolt.merging.checkpoints import TIED_BY_DEFAULT, Checkpoint
from lmolt.merging.reading import read_inputs
from lmolt.merging.settings import Recipe

SLERP = ("--method", "slerp", "--weights", 0.75, 0.25)


@pytest.fixture
def ab(tiny_policy, tmp_path):
    """Folders A and B, one shard each, bf16."""
    folders = []
    for seed, name in enumerate("AB"):
        model = AutoModelForCausalLM.from_pretrained(tiny_policy, dtype=torch.bfloat16)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.01)
        folders.append(tmp_path / name)
        shutil.copytree(tiny_policy, folders[-1])
        model.save_pretrained(folders[-1])
    return folders


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: x.contiguous() for name, x in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


def configure(folder, *, drop=(), file="config.json", **values):
    config = json.loads((folder / file).read_text()) | values
    (folder / file).write_text(json.dumps({key: value for key, value in config.items() if key not in drop}))


def test_the_table_of_ties_is_transformers():
    kinds = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES} & {*CONFIG_MAPPING}
    found = set()
    for kind in kinds:
        try:
            found |= {kind} if CONFIG_MAPPING[kind]().tie_word_embeddings else set()
        except Exception:  # a config that can't be made without arguments
            found |= {kind} & TIED_BY_DEFAULT
    assert found == TIED_BY_DEFAULT & kinds


def test_the_single_file_is_read_before_an_index(merge, ab, tmp_path, capsys):
    """As transformers: shards of an earlier save_pretrained lie beside it."""
    a, b = ab
    model = AutoModelForCausalLM.from_pretrained(b, dtype="auto")
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    for file in (tmp_path / "shards").glob("model*"):
        shutil.copy(file, a)
    merge("--method", "linear", "--weights", 1, 0, "--models", a, b, "--output", tmp_path / "O")
    loaded, merged = (
        AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict() for folder in (a, tmp_path / "O")
    )
    assert all(torch.equal(loaded[name], merged[name]) for name in loaded)
    assert "model.safetensors is read, as transformers does, not the index's shards" in capsys.readouterr().out
    (a / "model-00001-of-00099.safetensors").write_bytes(b"cut")  # not even looked at
    assert Checkpoint(a).files.keys() == {"model.safetensors"}


@pytest.mark.parametrize("method", ["slerp", "ties", "dare_ties", "linear", "nuslerp"])
def test_one_reading_or_two_of_files_in_another_order(ab, tmp_path, method):
    """Shards of one model, one file of the other: hashes are the files', and what is learnt of a tensor is the same."""
    a, b = ab
    AutoModelForCausalLM.from_pretrained(b, dtype="auto").save_pretrained(tmp_path / "B2", max_shard_size="100KB")
    recipe = Recipe(method, [0.75, 0.25], [0.5, 0.5])
    found = []
    for second in (b, tmp_path / "B2"):
        models = [Checkpoint(a), Checkpoint(second)]
        base = None if method in ("slerp", "linear") else Checkpoint(b)
        counted = []
        hashes, known = read_inputs(models, base, recipe, "BF16", counted.append)
        assert hashes[:2] == [{f: content_hash(m.folder / f, remember=False) for f in m.files} for m in models]
        assert sum(counted) == sum(e.size for m in [*models, *filter(None, [base])] for e in m.entries.values())
        found.append({name: [np.asarray(value).tolist() for value in values] for name, values in known.items()})
    assert found[0] == found[1] and found[0].keys() == models[0].entries.keys()
    assert all(map(bool, found[0].values())) == (method != "linear")
    rewrite(b, lambda tensors: tensors["model.norm.weight"].fill_(float("inf")))
    with pytest.raises(ValueError, match=r"B/model.safetensors: model.norm.weight holds NaN or infinity"):
        read_inputs([Checkpoint(a), Checkpoint(b)], base and Checkpoint(b), recipe, "BF16", counted.append)


def test_a_tensor_in_two_shards(merge, ab, tmp_path, capsys):
    """Equal: read once, and said. Another: which of them a loader takes is nobody's promise."""
    a, b = ab
    model = AutoModelForCausalLM.from_pretrained(a, dtype="auto")
    model.save_pretrained(tmp_path / "S", max_shard_size="100KB")
    first, *_, last = sorted((tmp_path / "S").glob("*.safetensors"))
    name, value = next(iter(load_file(first).items()))
    save_file(load_file(last) | {name: value}, last, {"format": "pt"})
    merge(*SLERP, "--models", tmp_path / "S", b, "--output", tmp_path / "O")
    merge(*SLERP, "--models", a, b, "--output", tmp_path / "P")
    assert f"{name} is in {first.name} and in {last.name}; it is read once" in capsys.readouterr().out
    one, two = ({n: x for f in (tmp_path / o).glob("*.safetensors") for n, x in load_file(f).items()} for o in "OP")
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)
    save_file(load_file(last) | {name: value + 1}, last, {"format": "pt"})
    with pytest.raises(ValueError, match=f"{name} is in {first.name} and in {last.name}, with other values"):
        merge(*SLERP, "--models", tmp_path / "S", b, "--output", tmp_path / "Q")


def test_buffers_are_copied_from_the_first_model(merge, ab, tmp_path):
    """What nothing loads, and what isn't a float: in one model only, of other values, of another type, infinite."""
    a, b = ab
    mine = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.arange(8.0),
        "model.steps": torch.tensor([3, 4]),
        "model.flags": torch.tensor([True, False]),
        "model.layers.0.attn.masked_bias": torch.tensor(-torch.inf),
    }
    rewrite(a, lambda tensors: tensors.update(mine))
    rewrite(
        b, lambda tensors: tensors.update({"model.steps": torch.tensor([9, 9]), "other.masked_bias": torch.tensor(0.0)})
    )
    merge(*SLERP, "--models", a, b, "--output", tmp_path / "O", "--verify")
    merged = load_file(tmp_path / "O" / "model.safetensors")
    for name, tensor in mine.items():
        assert merged[name].dtype == tensor.dtype and torch.equal(merged[name], tensor)
    assert "other.masked_bias" not in merged
    assert json.loads((tmp_path / "O" / "merge.json").read_text())["total"]["buffers_copied_from_the_first"] == 4


def tie(folder):
    """The folder as a tied model's."""
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, tie_word_embeddings=True))
    torch.manual_seed(len(folder.name))
    model.bfloat16().save_pretrained(folder)


@pytest.mark.parametrize("said", [True, None])
def test_a_tied_head_that_is_stored_all_the_same_is_left_out(merge, ab, tmp_path, said):
    a, b = ab
    for folder in ab:
        tie(folder)
        configure(folder, model_type="gemma2" if said is None else "llama")
    rewrite(a, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    if said is None:  # Gemma 2 ties where the config doesn't say so
        configure(b, drop=["tie_word_embeddings"])
    merge(*SLERP, "--models", a, b, "--output", tmp_path / "O")
    assert "lm_head.weight" not in load_file(tmp_path / "O" / "model.safetensors")
    assert json.loads((tmp_path / "O" / "config.json").read_text())["tie_word_embeddings"] is True


def test_an_old_quantization_config_is_left_out(merge, ab, tmp_path, capsys):
    configure(ab[0], quantization_config={"load_in_4bit": True, "quant_method": "bitsandbytes"})
    merge(*SLERP, "--models", *ab, "--output", tmp_path / "O")
    assert "quantization_config" not in json.loads((tmp_path / "O" / "config.json").read_text())
    assert "has a quantization_config beside plain weights; it is left out" in capsys.readouterr().out
    kinds = {type(m).__name__ for m in AutoModelForCausalLM.from_pretrained(tmp_path / "O").modules()}
    assert "Linear4bit" not in kinds


def rename_token(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    one, two = list(vocabulary)[300:302]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (folder / "tokenizer.json").write_text(json.dumps(content))


MEAN_OTHER_THINGS = {
    "heads": (
        lambda b: configure(b, num_attention_heads=8),
        "num_attention_heads is 4 in .*A, 8 in .*B: .* other",
    ),
    "rope": (
        lambda b: configure(b, rope_parameters={"rope_theta": 1e6, "rope_type": "default"}),
        "rope_theta is 10000.0 in .*A, 1000000.0 in .*B",
    ),
    "activation": (lambda b: configure(b, hidden_act="gelu"), "hidden_act is 'silu' in .*A, 'gelu' in .*B"),
    "norm": (lambda b: configure(b, rms_norm_eps=1e-5), "rms_norm_eps is 1e-06 in .*A, 1e-05 in .*B"),
    "tokens": (rename_token, r"2 tokens have other numbers: .* is 300 in the first, 301 in the second"),
}


@pytest.mark.parametrize("case", MEAN_OTHER_THINGS)
def test_equal_shapes_that_mean_other_things(merge, ab, tmp_path, case):
    spoil, message = MEAN_OTHER_THINGS[case]
    spoil(ab[1])
    with pytest.raises(ValueError, match=message):
        merge(*SLERP, "--models", *ab, "--output", tmp_path / "O")
    assert not list(tmp_path.glob("O*"))


def test_harmless_differences_are_said(merge, ab, tmp_path, capsys):
    configure(
        ab[1], max_position_embeddings=4096, attention_dropout=0.1, transformers_version="4.40.0", dtype="float32"
    )
    configure(ab[1], architectures=["LlamaForSequenceClassification"])
    for folder, word, heat in zip(ab, ("one", "two"), (0.2, 0.7), strict=True):
        (folder / "chat_template.jinja").write_text(word)
        values = {"temperature": heat, "transformers_version": word}
        (folder / "generation_config.json").write_text(json.dumps(values))
    merge(*SLERP, "--models", *ab, "--output", tmp_path / "O")
    out = capsys.readouterr().out
    assert "max_position_embeddings is 1024 in" in out and "different chat templates" in out
    assert "architectures is ['LlamaForCausalLM'] in" in out and "generation_config.json differ in temperature" in out
    assert "dropout" not in out and "transformers_version" not in out


def test_what_one_model_says_or_holds_alone_is_said(merge, ab, tmp_path, capsys):
    """A key that is left out means its class's default, which need not be what the other says."""
    configure(ab[1], logit_multiplier=3, tokens_per_expert=2)
    configure(ab[0], rms_norm_eps=1e-6, drop=("rms_norm_eps",))
    rewrite(ab[1], lambda tensors: tensors.update(steps=torch.tensor(3)))
    tokenizer = json.loads((ab[1] / "tokenizer.json").read_text())
    (ab[1] / "tokenizer.json").write_text(json.dumps(tokenizer | {"normalizer": {"type": "Lowercase"}}))
    (ab[0] / "adapter_config.json").write_text("{}")
    merge(*SLERP, "--models", *ab, "--output", tmp_path / "O")
    out = capsys.readouterr().out
    assert "says logit_multiplier = 3, rms_norm_eps = 1e-06, tokens_per_expert = 2; see that" in out
    assert "holds steps (1 tensors that are not floats)" in out
    assert "their tokenizers differ in normalizer; the output has the first's" in out
    assert f"{ab[0]}: an adapter lies beside the weights" in out


def test_the_vocabulary_that_a_loader_takes_first_is_compared(merge, ab, tmp_path):
    """The older vocab.json beside it may be the same in both."""
    for folder in ab:
        (folder / "vocab.json").write_text('{"a": 0}')
    rename_token(ab[1])
    with pytest.raises(ValueError, match="tokens have other numbers"):
        merge(*SLERP, "--models", *ab, "--output", tmp_path / "O")


@pytest.mark.parametrize("method", ["slerp", "linear"])
def test_values_whose_squares_overflow_are_refused(merge, ab, tmp_path, method):
    rewrite(ab[1], lambda tensors: tensors["model.norm.weight"].fill_(1e30))
    with pytest.raises(ValueError, match="model.norm.weight holds values beyond 1e19"):
        merge("--method", method, "--weights", 0.75, 0.25, "--models", *ab, "--output", tmp_path / "O")
    assert not (tmp_path / "O").exists()


def test_transformers_4_and_5_say_rope_in_two_ways(merge, ab, tmp_path):
    configure(ab[1], drop=["rope_parameters"], rope_theta=10000.0, rope_scaling=None, torch_dtype="bfloat16")
    merge(*SLERP, "--models", *ab, "--output", tmp_path / "O")


# --- the other files


def test_everything_but_weights_and_records_is_copied(merge, ab, tmp_path):
    a = ab[0]
    wanted = ("spiece.model", "tokenization_x.py", "qwen.tiktoken", "chat_template.json", "LICENSE")
    for name in (*wanted, "additional_chat_templates/tool.jinja"):
        (a / name).parent.mkdir(exist_ok=True)
        (a / name).write_text(name)
    for name in ("pytorch_model.bin", "optimizer.pt", ".env", "train.csv", "checkpoint-5/tokenizer.model", "id_rsa"):
        (a / name).parent.mkdir(exist_ok=True)
        (a / name).write_text(name)
    merge(*SLERP, "--models", *ab, "--output", tmp_path / "O")
    found = {str(file.relative_to(tmp_path / "O")) for file in (tmp_path / "O").rglob("*") if file.is_file()}
    assert {*wanted, "additional_chat_templates/tool.jinja", "tokenizer.json", "merge.json", "README.md"} <= found
    assert not found & {"pytorch_model.bin", "optimizer.pt", ".env", "train.csv", "id_rsa"}
    assert not any("checkpoint-5" in name for name in found)


def test_links_that_leave_the_folder_are_not_copied(merge, ab, tmp_path, capsys):
    (tmp_path / "secret").write_text("password")
    (ab[0] / "vocab.json").symlink_to(tmp_path / "secret")
    (ab[0] / "elsewhere").symlink_to(tmp_path)
    merge(*SLERP, "--models", *ab, "--output", tmp_path / "O")
    assert not (tmp_path / "O" / "vocab.json").exists() and not (tmp_path / "O" / "elsewhere").exists()
    assert "vocab.json is a link out of its folder; it isn't copied" in capsys.readouterr().out


def test_a_tokenizer_that_would_not_be_copied_is_refused(merge, ab, tmp_path):
    (ab[0] / "tokenizer.json").rename(tmp_path / "t.json")
    (ab[0] / "tokenizer.json").symlink_to(tmp_path / "t.json")
    with pytest.raises(ValueError, match="A/tokenizer.json is a link out of its folder, .* put the file itself there"):
        merge(*SLERP, "--models", *ab, "--output", tmp_path / "O")
    assert not list(tmp_path.glob("O*"))


def test_no_tokenizers_file_is_left_out(tmp_path):
    """Nothing that a tokenizer of transformers reads is taken for weights or a record."""
    names = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tekken.json"}
    for kind in TOKENIZER_MAPPING_NAMES.values():
        made = getattr(transformers, kind, None) if kind else None
        names |= {*getattr(made, "vocab_files_names", {}).values()}
    assert len(names) > 15
    for name in names:
        (tmp_path / name).write_text("{}")
    assert {str(file) for file in files_to_copy(tmp_path)[0]} == names


def test_the_hubs_cache_links_into_its_own_blobs(tmp_path):
    repository = tmp_path / "models--x--y"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True), (repository / "blobs").mkdir()
    (repository / "blobs" / "1").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/1")
    assert [str(file) for file in files_to_copy(snapshot)[0]] == ["tokenizer.json"]


def test_a_model_without_a_vocabulary(merge, ab, tmp_path, capsys):
    (ab[0] / "tokenizer.json").unlink()
    merge(*SLERP, "--models", *ab, "--output", tmp_path / "O")
    assert "has a tokenizer_config.json and no vocabulary; nor has the output" in capsys.readouterr().out


def test_a_sentencepiece_t5_keeps_its_vocabulary(merge, tmp_path):
    import sentencepiece
    from transformers import T5Config, T5ForConditionalGeneration

    (tmp_path / "corpus.txt").write_text("\n".join(["The molecule is an aromatic amine.", "CC(=O)Nc1ccccc1"] * 50))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"), model_prefix=str(tmp_path / "spiece"), vocab_size=29, minloglevel=2,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
    )  # fmt: skip
    for seed, name in enumerate("AB"):
        torch.manual_seed(seed)
        config = T5Config(vocab_size=160, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        T5ForConditionalGeneration(config).save_pretrained(tmp_path / name)
        shutil.copy(tmp_path / "spiece.model", tmp_path / name)
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer"}))
    merge(*SLERP, "--models", tmp_path / "A", tmp_path / "B", "--output", tmp_path / "O")
    ids = [AutoTokenizer.from_pretrained(tmp_path / name)("The molecule").input_ids for name in "AO"]
    assert ids[0] == ids[1] and 2 not in ids[0]


# --- malformed files


BROKEN = {
    "list": ("model.safetensors", "[1, 2]", r"model.safetensors: its header is a list, not \{tensor: about\}"),
    "number": ("model.safetensors", '{"w": 3}', "model.safetensors: the header's entry of 'w' is malformed"),
    "no dtype": ("model.safetensors", '{"w": {"shape": [1], "data_offsets": [0, 2]}}', "entry of 'w' is malformed"),
    "offsets": (
        "model.safetensors",
        '{"w": {"dtype": "F16", "shape": [1], "data_offsets": null}}',
        "entry of 'w' is malformed",
    ),
    "negative": (
        "model.safetensors",
        '{"w": {"dtype": "F16", "shape": [-1], "data_offsets": [0, 2]}}',
        "entry of 'w' is malformed",
    ),
    "dtype": (
        "model.safetensors",
        '{"w": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]}}',
        "w is of type F8_E4M3; merging takes bf16",
    ),
    "deep": ("model.safetensors", "[" * 100_000, "model.safetensors: its header is not JSON"),
    "config": ("config.json", "[]", "config.json: '\\[\\]' is not a JSON object"),
    "cut config": ("config.json", '{"a": ', "config.json line 1"),
    "index": ("model.safetensors.index.json", "{}", "model.safetensors.index.json: has no weight_map"),
    "index list": ("model.safetensors.index.json", "[]", "model.safetensors.index.json: '\\[\\]' is not a JSON object"),
    "cut index": ("model.safetensors.index.json", '{"weight_map": {', "model.safetensors.index.json line 1"),
    "outside": (
        "model.safetensors.index.json",
        '{"weight_map": {"w": "../B/model.safetensors"}}',
        "there is no such file; its index names it",
    ),
    "tokenizer": ("tokenizer.json", '{"model": 3}', "tokenizer.json: holds no vocabulary"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_malformed_file_is_named_in_one_line(merge, ab, tmp_path, case):
    name, content, message = BROKEN[case]
    content = content.encode()
    if name == "model.safetensors":
        content = len(content).to_bytes(8, "little") + content + b"\0" * 2
    if "index" in name:
        (ab[0] / "model.safetensors").unlink()
    (ab[0] / name).write_bytes(content)
    with pytest.raises((ValueError, OSError), match=message) as error:
        merge(*SLERP, "--models", *ab, "--output", tmp_path / "O")
    assert "\n" not in str(error.value) and not list(tmp_path.glob("O*"))


# --- recipes and arguments


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method: slepr\n", "r.yaml: method is 'slepr'; use one of ties, slerp"),
        ("dtype: bf16\n", "r.yaml: dtype is 'bf16'; use one of bfloat16"),
        ("weights: [a, b]\n", "r.yaml: weights is 'a'; it is a number"),
        ("lambda: x\n", "r.yaml: lambda is 'x'; it is a number"),
        ("method: [\n", "r.yaml line 2: not a YAML mapping"),
    ],
)
def test_a_recipes_values_are_checked(merge, ab, tmp_path, text, message):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        merge("--recipe", tmp_path / "r.yaml", *SLERP[2:], "--models", *ab, "--output", tmp_path / "O")


def test_scalars_and_texts_in_a_recipe(merge, ab, tmp_path):
    a, b = ab
    (tmp_path / "r.yaml").write_text(
        f'method: ties\ndensity: 0.5\nweights: ["0.5", "0.5"]\nmodels: [{a}, {b}]\nbase: {a}\n'
    )
    merge("--recipe", tmp_path / "r.yaml", "--output", tmp_path / "O")
    arguments = json.loads((tmp_path / "O" / "merge.json").read_text())["arguments"]
    assert arguments["weights"] == [0.5, 0.5] and arguments["density"] == [0.5]


def test_t_wins_over_a_recipes_weights(merge, ab, tmp_path):
    (tmp_path / "r.yaml").write_text("method: slerp\nweights: [0.95, 0.05]\n")
    merge("--recipe", tmp_path / "r.yaml", "--t", 0.3, "--models", *ab, "--output", tmp_path / "O")
    assert json.loads((tmp_path / "O" / "merge.json").read_text())["total"]["asked_weights"] == pytest.approx(
        [0.7, 0.3]
    )


def test_mergekits_yaml_is_a_recipe(merge, ab, tmp_path):
    """The gradients of a published SLERP, on two layers; --verify works them out again from merge.json."""
    a, b = ab
    sources = [{"model": str(folder), "layer_range": [0, 2]} for folder in ab]
    t = [{"filter": "self_attn", "value": [0, 1]}, {"filter": "mlp", "value": [1, 0]}, {"value": 0.5}]
    config = {"slices": [{"sources": sources}], "merge_method": "slerp", "base_model": str(a)}
    config |= {"parameters": {"t": t}, "dtype": "bfloat16"}
    (tmp_path / "r.yaml").write_text(json.dumps(config))
    merge("--recipe", tmp_path / "r.yaml", "--output", tmp_path / "O", "--verify")
    merged, one, two = (load_file(folder / "model.safetensors") for folder in (tmp_path / "O", a, b))
    for layer, equal in ((0, one), (1, two)):
        name = f"model.layers.{layer}.self_attn.q_proj.weight"
        assert torch.equal(merged[name], equal[name])
    config["slices"][0]["sources"] = [source | {"layer_range": [0, 32]} for source in sources]
    (tmp_path / "r.yaml").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="layer_range ends at 32, .* has 2 layers"):
        merge("--recipe", tmp_path / "r.yaml", "--output", tmp_path / "P")


def test_a_recipe_of_mergekit_may_repeat_by_anchors_and_filter_without_a_rest(merge, ab, tmp_path):
    a, b = ab
    text = f"merge_method: linear\nmodels:\n- model: {a}\n  parameters: &same\n    weight: 2\n- model: {b}\n"
    (tmp_path / "r.yaml").write_text(text + "  parameters: *same\n")
    merge("--recipe", tmp_path / "r.yaml", "--output", tmp_path / "O")
    assert json.loads((tmp_path / "O" / "merge.json").read_text())["arguments"]["weights"] == [2, 2]
    text = f"merge_method: slerp\nbase_model: {a}\nmodels: [{{model: {a}}}, {{model: {b}}}]\n"
    (tmp_path / "r.yaml").write_text(text + "parameters: {t: [{filter: mlp, value: 0.3}]}\n")
    with pytest.raises(ValueError, match="lm_head.weight: no filter of .* fits it; add a last entry without a filter"):
        merge("--recipe", tmp_path / "r.yaml", "--output", tmp_path / "P")


def test_resume_of_a_finished_merge_compares_the_arguments(merge, ab, tmp_path, capsys):
    call = ("--models", *ab, "--output", tmp_path / "O", "--method", "slerp")
    merge(*call, "--t", 0.05)
    merge(*call, "--t", 0.05, "--resume")
    assert "is already finished" in capsys.readouterr().out
    with pytest.raises(ValueError, match="is a finished merge with weights None, not .0.5, 0.5."):
        merge(*call, "--weights", 0.5, 0.5, "--resume")
    with pytest.raises(ValueError, match="--output names the folder"):
        merge("--models", *ab, "--method", "slerp", "--t", 0.05, "--resume")
    file = tmp_path / "O" / "model.safetensors"
    whole = file.read_bytes()
    for damaged in (whole[:-1] + bytes([whole[-1] ^ 1]), None):
        file.unlink() if damaged is None else file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"O/model.safetensors is not what was written"):
            merge(*call, "--t", 0.05, "--resume")
    file.write_bytes(whole)
    rewrite(ab[1], lambda tensors: tensors["model.norm.weight"].mul_(2))  # trained on since
    with pytest.raises(ValueError, match=r"B/model.safetensors is not what was merged into .*O"):
        merge(*call, "--t", 0.05, "--resume")


def test_paths_are_stored_absolute(merge, ab, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    merge(*SLERP, "--models", "A", "B", "--output", "O")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    merge("--verify", tmp_path / "O")


def test_a_links_target_is_what_is_written(merge, ab, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    merge(*SLERP, "--models", *ab, "--output", tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "merge.json").is_file()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--output", "."), "--output .* is where you are, and can't be put in place whole"),
        (("--output", "O", "--plot", "no/such/f.png"), "--plot no/such/f.png: there is no such folder"),
    ],
)
def test_what_would_fail_at_the_end_fails_at_the_start(merge, ab, tmp_path, monkeypatch, argv, message):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(ValueError, match=message):
        merge(*SLERP, "--models", *ab, *argv)
    assert not list((tmp_path / "empty").iterdir())


def test_room_is_counted_with_the_copied_files(merge, ab, tmp_path, monkeypatch):
    with (ab[0] / "big.txt").open("wb") as file:
        file.truncate(50_000_000)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=20_000_000))
    with pytest.raises(ValueError, match="needs 4[89] MiB, 19 MiB are free there"):
        merge(*SLERP, "--models", *ab, "--output", tmp_path / "O")


def test_a_nested_type_is_told_too(merge, ab, tmp_path):
    for folder in ab:
        configure(folder, text_config={"dtype": "bfloat16"})
    merge(*SLERP, "--models", *ab, "--output", tmp_path / "O", "--dtype", "float32")
    config = json.loads((tmp_path / "O" / "config.json").read_text())
    assert config["dtype"] == config["text_config"]["dtype"] == "float32"


def test_the_base_that_both_cards_name_is_found(merge, ab, tmp_path, monkeypatch, capsys):
    """In the Hub's cache: the weights are fitted as deltas from it."""
    snapshot = tmp_path / "hub" / "models--someone--base" / "snapshots" / "abc"
    shutil.copytree(ab[0], snapshot)
    for folder in ab:
        (folder / "README.md").write_text("---\nbase_model: someone/base\n---\n# x\n")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    rewrite(snapshot, lambda tensors: [x.mul_(0.99) for x in tensors.values()])
    merge("--method", "linear", "--weights", 0.5, 0.5, "--models", *ab, "--output", tmp_path / "O")
    total = json.loads((tmp_path / "O" / "merge.json").read_text())["total"]
    assert total["fitted_as"] == "deltas from someone/base, stored as BF16"
    assert total["effective_weights"] == pytest.approx([0.5, 0.5], abs=0.02)


def test_a_ratio_that_rounding_ate_is_warned_of(merge, tiny_policy, tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(tiny_policy, dtype=torch.bfloat16)
    start = {name: x.clone() for name, x in model.state_dict().items()}
    for seed, name in enumerate("AB"):
        torch.manual_seed(seed)
        changed = {n: (x.float() * (1 + 0.005 * torch.randn(x.shape))).bfloat16() for n, x in start.items()}
        model.load_state_dict(changed)
        model.save_pretrained(tmp_path / name)
    call = ("--models", tmp_path / "A", tmp_path / "B", "--method", "slerp", "--weights", 0.95, 0.05)
    merge(*call, "--output", tmp_path / "O")
    out = capsys.readouterr().out
    assert "warning: rounding left " in out and "--dtype float32 keeps the ratio" in out
    merge(*call, "--output", tmp_path / "P", "--dtype", "float32")
    assert "warning" not in capsys.readouterr().out
