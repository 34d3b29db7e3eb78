"""Gradients, filters, and mergekit's YAML: what published configurations of each kind mean."""

import pytest
import yaml

from lmolt.merging.settings import Recipe, check_recipe, count_layers, evaluate, read_mergekit

NAMES = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
NAMES += [f"model.layers.{i}.{part}.weight" for i in range(5) for part in ("self_attn.q_proj", "mlp.up_proj")]


def test_a_gradient_runs_over_the_layers():
    recipe = Recipe("linear", [[0, 1], 0.5], layers=count_layers(NAMES))
    assert recipe.layers == {"model.layers": 5}
    weights = [recipe.weights_of(f"model.layers.{i}.mlp.up_proj.weight")[0] for i in range(5)]
    assert weights == [0, 0.25, 0.5, 0.75, 1]
    assert recipe.weights_of("model.embed_tokens.weight") == [0, 0.5]  # outside of them its first value, as mergekit


def test_more_points_are_joined_by_lines():
    assert [evaluate([0, 0.5, 0.3], "x", place) for place in (0, 0.25, 0.5, 0.75, 1)] == pytest.approx(
        [0, 0.25, 0.5, 0.4, 0.3]
    )
    assert evaluate([0.7], "x", 1.0) == 0.7


def test_stacks_are_counted_apart():
    assert count_layers(["encoder.block.0.x.1.w", "encoder.block.2.w", "decoder.block.0.w"]) == {
        "encoder.block": 3,
        "decoder.block": 1,
    }
    assert Recipe("linear", [[0, 1]], layers={"decoder.block": 1}).weights_of("decoder.block.0.w") == [1]


def test_the_first_filter_that_fits_counts():
    setting = [{"filter": "self_attn", "value": [0, 1]}, {"filter": "mlp", "value": 0.9}, {"value": 0.5}]
    recipe = Recipe("slerp", t=setting, layers=count_layers(NAMES))
    assert recipe.weights_of("model.layers.2.self_attn.q_proj.weight") == [0.5, 0.5]
    assert recipe.weights_of("model.layers.4.mlp.up_proj.weight") == pytest.approx([0.1, 0.9])
    assert recipe.weights_of("lm_head.weight") == [0.5, 0.5]
    with pytest.raises(ValueError, match="lm_head.weight: no filter of .* fits it; add a last entry"):
        evaluate(setting[:2], "lm_head.weight", 0)


# Configurations as public cards and repositories hold them, with other models' names, from 2023 to 2026


def model(name, **parameters):
    return {"model": name} | ({"parameters": parameters} if parameters else {})


def sauce(head, embedding, attention, norms, last_norm):
    """t as a family of early merges has it: each kind of tensor its own, one filter fits none of Llama's."""
    fitted = [("lm_head", [head]), ("embed_tokens", [embedding]), ("self_attn", attention), ("mlp", attention[::-1])]
    fitted += [("layernorm", norms), ("modelnorm", [last_norm])]
    return [*({"filter": name, "value": value} for name, value in fitted), {"value": 0.5}]


def by_module(attention, mlp, rest):
    return [{"filter": "self_attn", "value": attention}, {"filter": "mlp", "value": mlp}, {"value": rest}]


SLERP_FILTERS = [  # t; what it is at the first layer's attention, the last one's MLP, the head, and the embedding
    (
        by_module([0, 0.5, 0.3, 0.7, 1], [1, 0.5, 0.7, 0.3, 0], 0.5),
        (0, 0, 0.5, 0.5),
    ),  # NeuralPipe-7B and its many copies
    (by_module(0.3, 0.7, 0.5), (0.3, 0.7, 0.5, 0.5)),  # a skill file for merging
    (sauce(0.75, 0.75, [0.75, 0.25], [0.5, 0.5], 0.75), (0.75, 0.75, 0.75, 0.75)),  # Mistral-11B-OmniMix
    (sauce(0.55, 0.7, [0.65, 0.35], [0.4, 0.6], 0.6), (0.65, 0.65, 0.55, 0.7)),  # Xwin-MLewd, GreenNode-LeoScorpius
    (sauce(0.5, 0.75, [0.75, 0.25], [0.5, 0.5], 0.5), (0.75, 0.75, 0.5, 0.75)),  # Nyxene-11B
    (
        [{"filter": "embed_tokens", "value": 0.7}, {"filter": "lm_head", "value": 0.7}, {"value": 0.5}],
        (0.5, 0.5, 0.7, 0.7),  # a Japanese recipe for a multilingual model
    ),
]


@pytest.mark.parametrize(("t", "expected"), SLERP_FILTERS)
@pytest.mark.parametrize("sliced", [True, False])
def test_slerp_with_filters(t, expected, sliced):
    slices = [{"sources": [model(name) | {"layer_range": [0, 5]} for name in "BA"]}]
    config = {"slices": slices} if sliced else {"models": [model("B"), model("A")]}
    config |= {"merge_method": "slerp", "base_model": "A", "parameters": {"t": t}, "dtype": "bfloat16"}
    settings, notes = read_mergekit(yaml.safe_load(yaml.safe_dump(config)), "f")
    assert settings["models"] == ["A", "B"] and settings["base"] is None  # the base is where t is 0
    assert settings["layers"] == (5 if sliced else None) and settings["dtype"] == "bfloat16" and notes == []
    recipe = Recipe("slerp", t=settings["t"])
    odd = [f"filter {name!r}: no tensor has such a name" for name in ("layernorm", "modelnorm") if len(t) == 7]
    assert check_recipe(recipe, NAMES, 2, False) == odd
    names = ("model.layers.0.self_attn.q_proj", "model.layers.4.mlp.up_proj", "lm_head", "model.embed_tokens")
    assert [recipe.weights_of(f"{name}.weight")[1] for name in names] == pytest.approx(expected)


TIES = [  # mergekit's, weights, densities, normalize, dtype
    (  # mlabonne's introduction to merging; the base is listed without parameters
        {
            "models": [model("C"), model("A", density=0.5, weight=0.5), model("B", density=0.5, weight=0.3)],
            "parameters": {"normalize": True},
            "dtype": "float16",
        },
        ([0.5, 0.3], [0.5, 0.5], True, "float16"),
    ),
    (  # two models and one setting for both
        {"models": [model("A"), model("B")], "parameters": {"weight": 0.5, "density": 0.5}, "dtype": "bfloat16"},
        ([0.5, 0.5], [0.5, 0.5], True, "bfloat16"),
    ),
    (  # mergekit's own example: gradients, a filter, a mask in 8 bits
        {
            "models": [
                model("A", density=[1, 0.7, 0.1], weight=1.0),
                model("B", density=0.5, weight=[0, 0.3, 0.7, 1]),
                model("D", density=0.33, weight=[{"filter": "mlp", "value": 0.5}, {"value": 0}]),
            ],
            "parameters": {"normalize": True, "int8_mask": True},
            "dtype": "float16",
        },
        (
            [1, [0, 0.3, 0.7, 1], [{"filter": "mlp", "value": 0.5}, {"value": 0}]],
            [[1, 0.7, 0.1], 0.5, 0.33],
            True,
            "float16",
        ),
    ),
    (  # three experts for a company's assistant: one density for all
        {
            "models": [model("A", weight=0.4), model("B", weight=0.3), model("D", weight=0.3)],
            "parameters": {"density": 0.5, "normalize": True},
            "dtype": "bfloat16",
        },
        ([0.4, 0.3, 0.3], [0.5, 0.5, 0.5], True, "bfloat16"),
    ),
    (  # the base listed with a weight and a density of its own, which do nothing
        {
            "models": [model("C", density=1.0, weight=1.0), model("A", density=0.5, weight=0.5)]
            + [model("B", density=0.5, weight=0.3)],
            "parameters": {"normalize": True},
            "dtype": "bfloat16",
        },
        ([0.5, 0.3], [0.5, 0.5], True, "bfloat16"),
    ),
    (  # adapters' outputs in one slice, settings of both at the end
        {
            "slices": [{"sources": [model(name) | {"layer_range": [0, 5]} for name in "AB"]}],
            "parameters": {"weight": 0.5, "density": 0.5},
            "dtype": "float16",
        },
        ([0.5, 0.5], [0.5, 0.5], True, "float16"),
    ),
    (  # as mergekit writes a configuration itself: switches as numbers
        {
            "models": [model("A", density=0.9, weight=0.6), model("B", density=0.7, weight=0.4)],
            "parameters": {"normalize": 0.0, "int8_mask": 1.0},
            "out_dtype": "bfloat16",
            "dtype": "float32",
        },
        ([0.6, 0.4], [0.9, 0.7], False, "bfloat16"),
    ),
]


@pytest.mark.parametrize(("config", "meaning"), TIES)
@pytest.mark.parametrize("method", ["ties", "dare_ties"])
def test_ties(config, meaning, method):
    settings, _ = read_mergekit(
        yaml.safe_load(yaml.safe_dump(config | {"merge_method": method, "base_model": "C"})), "f"
    )
    weights, densities, normalize, dtype = meaning
    assert (settings["weights"], settings["density"], settings["dtype"]) == (weights, densities, dtype)
    assert settings["models"][:2] == ["A", "B"] and settings["base"] == "C"
    recipe = Recipe(method, settings["weights"], settings["density"], settings["normalize"])
    said = (config.get("parameters") or {}).get("normalize")
    assert recipe.normalize == (normalize if said is not None or method == "ties" else False)
    check_recipe(recipe, NAMES, len(weights), True)


LINEAR = [
    ([("A", 0.3), ("B", 0.5), ("D", 0.2)], {"dtype": "float16"}, "float16"),  # Tiefighter, Noromaid, Vicuna
    ([("A", 1.0), ("B", 1.0), ("D", 1.0)], {"dtype": "float16"}, "float16"),  # three Llama 3 chats
    ([("A", 1.0), ("B", 0.5)], {"base_model": "A"}, None),  # Llama 2 and Code Llama; the base is one of the two
    (  # five checkpoints of one run, the later the more
        [(name, weight) for weight, name in enumerate("ABDEF", 1)],
        {"base_model": "F", "parameters": {"normalize": True}, "dtype": "float32", "out_dtype": "bfloat16"},
        "bfloat16",
    ),
    ([("A", 0.5), ("B", 0.5)], {"dtype": "bfloat16"}, "bfloat16"),  # a Galician Llama and a fine-tuned one
]


@pytest.mark.parametrize(("models", "more", "dtype"), LINEAR)
def test_linear(models, more, dtype):
    config = {"merge_method": "linear", "models": [model(name, weight=weight) for name, weight in models]}
    settings, _ = read_mergekit(config | more, "f")
    assert settings["models"] == [name for name, _ in models] and settings["base"] is None
    assert settings["weights"] == [weight for _, weight in models] and settings["dtype"] == dtype
    assert Recipe("linear", settings["weights"], normalize=settings["normalize"]).normalize


ARITHMETIC = [
    ([("A", 1.0), ("B", 1.0)], {"dtype": "bfloat16"}, False),  # TAIDE and Llama 2 chat
    ([("C", None), ("A", 1.0), ("B", 0.01), ("D", 0.02)], {"dtype": "float16"}, False),  # Tiefighter, a bit of others
    ([("C", None), ("A", 1.0), ("B", 0.25)], {"dtype": "float16"}, False),  # Echidna-Tiefighter
    ([("A", 0.5), ("B", 0.3), ("D", 0.2)], {"dtype": "bfloat16"}, False),  # mathematics, chat, code
    ([("A", 0.6), ("B", 0.4)], {"dtype": "bfloat16"}, False),  # mathematics and code of Mixtral
    (  # four coders on a base of long context
        [("A", 1), ("B", 0.5), ("D", 0.5), ("E", 0.5)],
        {"parameters": {"normalize": True, "int8_mask": True}, "dtype": "float16"},
        True,
    ),
    ([("A", 1.0), ("B", 0.3)], {"parameters": {"normalize": False}, "dtype": "bfloat16"}, False),  # ThaiLLM's
]


@pytest.mark.parametrize(("models", "more", "normalize"), ARITHMETIC)
def test_task_arithmetic(models, more, normalize):
    listed = [model(name) if weight is None else model(name, weight=weight) for name, weight in models]
    config = {"merge_method": "task_arithmetic", "base_model": "C", "models": listed}
    settings, _ = read_mergekit(config | more, "f")
    kept = [(name, weight) for name, weight in models if name != "C"]
    assert settings["models"] == [name for name, _ in kept] and settings["base"] == "C"
    assert settings["weights"] == [weight for _, weight in kept]
    assert settings["lambda"] == (more.get("parameters") or {}).get("lambda", 1.0)
    assert Recipe("task_arithmetic", settings["weights"], normalize=settings["normalize"]).normalize == normalize


def test_the_bases_own_weight_is_said_to_do_nothing():
    config = {"merge_method": "dare_ties", "base_model": "C", "parameters": {"weight": 1}}
    settings, notes = read_mergekit(config | {"models": [model("C", weight=0.3, density=0.35), model("A")]}, "f")
    assert settings["models"] == ["A"] and notes == ["C is the base: its density, weight do nothing"]


SLERP = {"merge_method": "slerp", "base_model": "A", "models": [model("A"), model("B")], "parameters": {"t": 0.5}}
TIED = {"merge_method": "ties", "base_model": "C", "models": [model("A", weight=1), model("B", weight=1)]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer_source": "union"}, "f: tokenizer_source is not supported; tokenizers are compared here"),  # SOLAR
        ({"tokenizer": {"source": "A"}}, "f: tokenizer is not supported; tokenizers are compared here"),  # ThaiLLM
        ({"chat_template": "auto"}, "f: chat_template is not supported"),
        ({"name": "first-merge"}, "f: name is not supported"),  # of mergekit-multi
        ({"modules": {}}, "f: modules is not supported"),
        ({"merge_method": "passthrough"}, "merge_method 'passthrough' is not supported, only ties, slerp"),
        ({"merge_method": "della"}, "merge_method 'della' is not supported"),
        ({"parameters": {"t": 0.5, "weight": 1}}, "parameters: weight has no meaning for slerp here"),
        ({"parameters": {}}, "parameters: t is missing"),
        ({"parameters": {"t": 0.5, "dare": {"drop_rate": 0.9}}}, "parameters: dare has no meaning for slerp here"),
        (TIED | {"parameters": {"normalize": [0, 1]}}, r"parameters: normalize is true or false here, not \[0, 1\]"),
        (TIED | {"parameters": {"normalize": "no"}}, "parameters: normalize is true or false here, not 'no'"),
        (TIED | {"parameters": {"lambda": [0.5, 1]}}, r"parameters: lambda is one number here, not \[0.5, 1.0\]"),
        (TIED | {"parameters": {"lambda": "x"}}, "parameters: lambda takes finite numbers, not 'x'"),
        (TIED | {"merge_method": "dare_ties", "parameters": {"rescale": 0.0}}, "rescale can't be switched off here"),
        ({"parameters": [1]}, "parameters is a mapping, not"),
        ({"models": [model("A"), model("B"), model("D")]}, "slerp takes base_model, the one at t = 0, and one other"),
        ({"models": [model("B"), model("D")]}, "slerp takes base_model"),
        ({"base_model": None}, "slerp takes base_model"),
        ({"models": [model("A"), model("B", t=0.5)]}, "t stands in the parameters of B; a model has weight and"),
        (TIED | {"models": [model("A", weight=1, normalize=True)]}, "normalize stands in the parameters of A"),
        (TIED | {"models": [model("A", weight=[{"pattern": "[", "value": 1}])]}, "f: pattern is not supported"),
        ({"models": [model("A"), model("A")]}, "slerp takes base_model, the one at t = 0, and one other"),
        ({"models": [model("A") | {"layer_range": [0, 4]}, model("B")]}, "models: .* is no {model: folder or Hub id"),
        ({"models": [model("A"), model("B+lora")]}, r"B\+lora: a model with an adapter is not supported; fold it"),
        ({"models": "AB"}, "models is a list"),
        ({"models": [model("A"), {"model": {"path": "B"}}]}, "models: .* is no {model: folder or Hub id"),
        ({"dtype": "int4"}, "dtype 'int4' is bfloat16, float16 or float32"),
        ({"slices": [{"sources": []}]}, "slices: one over all layers is supported, and no models beside it"),
    ],
)
def test_the_rest_is_refused_by_its_key(change, message):
    with pytest.raises(ValueError, match=message):
        read_mergekit({key: value for key, value in (SLERP | change).items() if value is not None}, "f")


def test_what_a_models_own_parameters_do_not_do_is_said():
    models = [model("A", weight=1, density=0.3), model("B", weight=1)]
    _, notes = read_mergekit({"merge_method": "linear", "models": models}, "f")
    assert notes == ["A: its density does nothing in linear"]


def test_parts_of_the_layers_are_refused():
    sources = lambda *ranges: [model(n) | {"layer_range": r} for n, r in zip("AB", ranges, strict=True)]
    base = {"merge_method": "slerp", "base_model": "A", "parameters": {"t": 0.5}}
    for slices in ([{"sources": sources([0, 8], [8, 16])}], [{"sources": sources([0, 8], [0, 8])}] * 2):
        with pytest.raises(ValueError, match="f: slices: "):
            read_mergekit(base | {"slices": slices}, "f")
    with pytest.raises(ValueError, match="slices: residual_weight is not supported"):
        read_mergekit(base | {"slices": [{"sources": sources([0, 8], [0, 8]), "residual_weight": 0.1}]}, "f")


def test_weights_are_numbers():
    with pytest.raises(ValueError, match="--weights takes finite numbers, not 'x'"):
        check_recipe(Recipe("linear", ["x", 1]), NAMES, 2, False)
    with pytest.raises(ValueError, match="--weights: {'filtre': 'mlp', 'value': 1} is no"):
        check_recipe(Recipe("linear", [[{"filtre": "mlp", "value": 1}], 1]), NAMES, 2, False)
    with pytest.raises(ValueError, match="--weights: {'filter': 3, 'value': 1} is no"):
        check_recipe(Recipe("linear", [[{"filter": 3, "value": 1}, {"value": 1}], 1]), NAMES, 2, False)
    with pytest.raises(ValueError, match=r"--density must lie in \(0, 1\], not 1.5"):
        check_recipe(Recipe("ties", [1], [[0.5, 1.5]]), NAMES, 1, True)
    with pytest.raises(ValueError, match="--t .here 1.2 for model.layers.4"):
        check_recipe(Recipe("slerp", t=[0, 1.2]), NAMES, 2, False)


def test_a_filter_that_no_tensor_has_is_said():
    recipe = Recipe("slerp", t=[{"filter": "layernorm", "value": 0.1}, {"value": 0.5}])
    assert check_recipe(recipe, NAMES, 2, False) == ["filter 'layernorm': no tensor has such a name"]
    recipe = Recipe("slerp", t=[{"value": 0.5}, {"filter": "mlp", "value": 0.1}])
    said = "filter 'mlp': another one goes before it in all tensors that it fits"
    assert check_recipe(recipe, NAMES, 2, False) == [said]
