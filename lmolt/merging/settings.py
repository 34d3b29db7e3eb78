"""How to merge: method, weights and densities by tensor, gradients over layers; also as mergekit's YAML writes them.

A setting is a number, a list of numbers (a gradient from the first layer to the last, linear in between), or a list of
{"filter": part of a tensor's name, or {"pattern": regular expression}, "value": number or gradient}, of which the first
that fits counts. Tensors outside the layers take a gradient's first value, as in mergekit 0.1.5.
"""

import math
import re
from dataclasses import dataclass, field

TAKES = {  # the methods, and of mergekit's parameters those that mean something for each
    "ties": {"weight", "density", "normalize", "lambda", "rescale"},
    "slerp": {"t"},
    "linear": {"weight", "normalize"},
    "dare_ties": {"weight", "density", "normalize", "lambda", "rescale"},
    "task_arithmetic": {"weight", "normalize", "lambda"},
    "nuslerp": {"weight", "nuslerp_flatten"},
}
METHODS = tuple(TAKES)
ON_BASE = ("ties", "dare_ties", "task_arithmetic", "nuslerp")  # sums of deltas from a base
NORMALIZED = ("linear", "ties")  # by default, as in mergekit 0.1.5
Setting = float | list


@dataclass
class Recipe:
    """`weights`, `density`: one setting a model; `t`, SLERP's way to the second model, instead of weights."""

    method: str
    weights: list[Setting] = field(default_factory=list)
    density: list[Setting] = field(default_factory=list)
    normalize: bool | None = None  # None: the method's default
    scale: float = 1.0  # lambda
    rounding: str = "once"  # or "mergekit", "stochastic"
    seed: int = 0  # of DARE's mask and of stochastic rounding
    t: Setting | None = None
    layers: dict[str, int] = field(default_factory=dict)  # number of layers by the name that leads to them

    def __post_init__(self):
        if self.normalize is None:
            self.normalize = self.method in NORMALIZED

    def weights_of(self, name: str) -> list[float]:
        if self.t is not None:
            t = evaluate(self.t, name, self.place(name))
            return [1 - t, t]
        return [evaluate(weight, name, self.place(name)) for weight in self.weights]

    def density_of(self, name: str) -> list[float]:
        return [evaluate(density, name, self.place(name)) for density in self.density]

    def shares_of(self, name: str) -> list[float]:
        """The weights as the method takes them: divided by their sum where it does so."""
        weights = self.weights_of(name)
        divided = self.method in ("slerp", "nuslerp") or (self.method == "linear" and self.normalize)
        return [weight / sum(weights) for weight in weights] if divided else weights

    def place(self, name: str) -> float:
        """0 for the first layer, 1 for the last (and for an only one); 0 outside of the layers."""
        match = LAYER.match(name)
        if not match or match[1] not in self.layers:
            return 0.0
        return int(match[2]) / (self.layers[match[1]] - 1) if self.layers[match[1]] > 1 else 1.0


LAYER = re.compile(r"([^0-9]*?)\.?(\d+)\.")


def count_layers(names: list[str]) -> dict[str, int]:
    """{name that leads to numbered layers: how many}, such as {"model.layers": 32}."""
    layers: dict[str, int] = {}
    for match in filter(None, map(LAYER.match, names)):
        layers[match[1]] = max(layers.get(match[1], 0), int(match[2]) + 1)
    return layers


def evaluate(setting: Setting, name: str, place: float) -> float:
    """The number that holds for the tensor `name` at `place` in [0, 1] of its layers."""
    if not isinstance(setting, list):
        return float(setting)
    if not isinstance(setting[0], dict):
        scaled = place * (len(setting) - 1)
        below = int(scaled)
        above = min(len(setting) - 1, below + 1)
        return (1 - (scaled - below)) * setting[below] + (scaled - below) * setting[above]
    for case in setting:
        if _fits(case, name):
            return evaluate(case["value"], name, place)
    raise ValueError(f"{name}: no filter of {setting} fits it; add a last entry without a filter")


def _fits(case: dict, name: str) -> bool:
    if "pattern" in case:
        return bool(re.search(case["pattern"], name))
    return case.get("filter") in (None, "*") or case["filter"] in name


def check_setting(what: str, setting: object, low: float | None = None, high: float | None = None) -> Setting:
    """`setting` with its numbers as floats; `ValueError` names what is none, or beyond `low` (exclusive) and `high`."""
    if isinstance(setting, list) and setting:
        if isinstance(setting[0], dict):
            for case in setting:
                known = isinstance(case, dict) and not case.keys() - {"filter", "pattern", "value"}
                if not known or "value" not in case or not isinstance(case.get("filter", ""), str | None):
                    raise ValueError(f"{what}: {case!r} is no {{filter: ..., value: ...}}")
            return [case | {"value": check_setting(what, case["value"], low, high)} for case in setting]
        return [check_setting(what, number, low, high) for number in setting]
    try:
        number = float(setting) if isinstance(setting, (int, float, str)) and not isinstance(setting, bool) else None
    except ValueError:
        number = None
    if number is None or not math.isfinite(number):
        raise ValueError(f"{what} takes finite numbers, not {setting!r}")
    if number and not 1e-12 <= abs(number) <= 1e12:  # sums and products of others leave what floats hold
        raise ValueError(f"{what} takes 0 and numbers of a size between 1e-12 and 1e12, not {setting!r}")
    if (low is not None and number <= low) or (high is not None and number > high):
        raise ValueError(f"{what} must lie in ({low:g}, {high:g}], not {number:g}")
    return number


def check_recipe(recipe: Recipe, names: list[str], count: int, base: bool) -> list[str]:
    """Notes; `ValueError` where the numbers don't fit the method, the number of models or the tensors' `names`."""
    method = recipe.method
    if method in ("slerp", "nuslerp") and count != 2:
        raise ValueError(
            f"{method.upper()} is between exactly two models, not {count}; linear and ties take any number"
        )
    if method in ON_BASE and not base and method != "nuslerp":
        raise ValueError(f"{method} needs --base: the model that all of --models were trained from")
    if method in ("slerp", "linear") and base:
        other = "nuslerp, SLERP of the deltas from it" if method == "slerp" else "task_arithmetic or ties"
        raise ValueError(f"{method} has no base; leave --base out, or use --method {other}")
    if count < 1 or (count < 2 and not base):
        raise ValueError(f"--models has {count} model; merging takes two or more")
    if recipe.t is not None and method != "slerp":
        raise ValueError(f"--t is slerp's; {method} takes --weights")
    if recipe.t is None and len(recipe.weights) != count:
        raise ValueError(f"--weights: {len(recipe.weights)} weights for {count} models; give one each, in their order")
    if method in ("ties", "dare_ties") and len(recipe.density) != count:
        raise ValueError(f"--density: {len(recipe.density)} values for {count} models; give one, or one each")
    recipe.weights = [check_setting("--weights", weight) for weight in recipe.weights]
    recipe.density = [check_setting("--density", density, 0, 1) for density in recipe.density]
    check_setting("--lambda", recipe.scale)
    recipe.layers = count_layers(names)
    notes = []
    settings = [("--weights_for", weight) for weight in recipe.weights] + [("t", recipe.t)]
    for flag, setting in settings + [("--density_for", density) for density in recipe.density]:
        cases = setting if isinstance(setting, list) and isinstance(setting[0], dict) else []
        counts = {next((i for i, case in enumerate(cases) if _fits(case, name)), None) for name in names}
        for index, case in enumerate(cases):
            if index in counts or ("pattern" not in case and case.get("filter") in (None, "*")):
                continue  # it counts, or is the rest's
            why = "no tensor has such a name"
            if any(_fits(case, name) for name in names):
                why = "another one goes before it in all tensors that it fits"
            said = f"{case.get('pattern') or case.get('filter')!r}: {why}"
            if "pattern" in case:
                raise ValueError(f"{flag} {said}; the first are {names[:3]}")
            notes.append(f"filter {said}")
    seen = 0.0
    for name in names:
        weights = recipe.weights_of(name)
        seen = max(seen, *map(abs, weights))
        if recipe.t is not None and not 0 <= weights[1] <= 1:
            raise ValueError(f"--t (here {weights[1]:g} for {name}) is the way from the first model, within [0, 1]")
        divides = method in ("slerp", "nuslerp") or (method == "linear" and recipe.normalize)
        if divides and abs(sum(weights)) <= 1e-9 * max(map(abs, weights)):  # .1 + .2 - .3 is not 0 in floats
            raise ValueError(f"--weights: {weights} add up to 0, by which {method} divides ({name})")
        if method in ("slerp", "nuslerp") and min(weights) < 0:
            raise ValueError(f"--weights: SLERP's weights are shares of the way, none below 0, not {weights} ({name})")
        recipe.density_of(name)
    if not seen or not recipe.scale:
        raise ValueError(
            f"--weights are all 0, or --lambda is: {method} would write {'the base' if base else 'zeros'}; "
            "give each model its share, such as 0.95 0.05"
        )
    return list(dict.fromkeys(notes))


# --- mergekit's YAML


def read_mergekit(config: dict, file: object) -> tuple[dict, list[str]]:
    """merge.py's arguments for a configuration of mergekit, and notes; `ValueError` names a key without meaning here.

    Read are merge_method, models (or one slice over all layers), base_model, parameters with filters and lists, dtype
    and out_dtype.
    """
    known = {"merge_method", "models", "slices", "base_model", "parameters", "dtype", "out_dtype"}
    if odd := sorted(map(str, config.keys() - known)):
        hint = "; tokenizers are compared here, and must number their tokens alike" if "token" in odd[0] else ""
        raise ValueError(
            f"{file}: {odd[0]} is not supported{hint}; of mergekit's keys these are: {', '.join(sorted(known))}"
        )
    method = config["merge_method"]
    if method not in METHODS:
        raise ValueError(f"{file}: merge_method {method!r} is not supported, only {', '.join(METHODS)}")
    common, notes, layers = _mapping(file, "parameters", config.get("parameters")), [], None
    sources = config.get("models")
    if "slices" in config:
        slices = config["slices"]
        if sources is not None or not isinstance(slices, list) or len(slices) != 1 or not isinstance(slices[0], dict):
            raise ValueError(f"{file}: slices: one over all layers is supported, and no models beside it")
        if odd := slices[0].keys() - {"sources", "parameters"}:
            raise ValueError(f"{file}: slices: {sorted(odd)[0]} is not supported")
        common |= _mapping(file, "slices: parameters", slices[0].get("parameters"))
        sources = slices[0].get("sources")
        ranges = [source.get("layer_range") if isinstance(source, dict) else None for source in sources or []]
        if any(r != ranges[0] or not isinstance(r, list) or len(r) != 2 or r[0] != 0 for r in ranges):
            raise ValueError(f"{file}: slices: layer_range is [0, number of layers] for all, not {ranges}")
        layers = ranges[0][1] if ranges else None
    if not isinstance(sources, list) or not sources:
        raise ValueError(f"{file}: models is a list of {{model: ..., parameters: ...}}")
    base, models, settings = config.get("base_model"), [], {"weight": [], "density": []}
    for source in sources:
        source = {"model": source} if isinstance(source, str) else source
        own = {"model", "parameters"} | ({"layer_range"} if "slices" in config else set())
        odd = source.keys() - own if isinstance(source, dict) else {"models"}
        if odd or not isinstance(source.get("model"), str):
            raise ValueError(f"{file}: models: {source!r} is no {{model: folder or Hub id, parameters: ...}}")
        own = _mapping(file, f"parameters of {source['model']}", source.get("parameters"))
        if source["model"] == base and method in ON_BASE:
            if own:
                notes.append(f"{base} is the base: its {', '.join(sorted(own))} do nothing")
            continue
        models.append(source["model"])
        if idle := sorted(own.keys() & settings.keys() - TAKES[method]):
            notes.append(f"{source['model']}: its {', '.join(idle)} does nothing in {method}")
        for key in settings:
            settings[key].append(own.pop(key, common.get(key)))
        if odd := sorted(own):
            raise ValueError(
                f"{file}: {odd[0]} stands in the parameters of {source['model']}; a model has weight and density, and "
                "what is of all stands in parameters beside models"
            )
    for name in [*models, *([base] if base else [])]:
        if "+" in name:
            raise ValueError(f"{file}: {name}: a model with an adapter is not supported; fold it with --adapter first")
    for value in [*common.values(), *settings["weight"], *settings["density"]]:
        if isinstance(value, list) and any(isinstance(case, dict) and "pattern" in case for case in value):
            raise ValueError(f"{file}: pattern is not supported; a filter is a part of a tensor's name")
    allowed = TAKES[method] | {"int8_mask"}
    if odd := sorted(common.keys() - allowed):
        raise ValueError(f"{file}: parameters: {odd[0]} has no meaning for {method} here")
    for key in ("normalize", "rescale", "nuslerp_flatten"):
        if common.get(key) not in (None, True, False):  # 1.0 and 0.0 too, as mergekit writes them
            raise ValueError(f"{file}: parameters: {key} is true or false here, not {common[key]!r}")
        if key != "normalize" and common.get(key) not in (None, True):
            raise ValueError(f"{file}: parameters: {key} can't be switched off here")
    normalize = common.get("normalize")
    scale = check_setting(f"{file}: parameters: lambda", common.get("lambda", 1.0))
    if isinstance(scale, list):
        raise ValueError(f"{file}: parameters: lambda is one number here, not {scale}")
    result: dict = {"method": method, "normalize": normalize if normalize is None else bool(normalize), "lambda": scale}
    if method == "slerp":
        if base not in models:
            models = [base, *models]
        if base is None or len(models) != 2 or models[0] == models[1]:
            raise ValueError(f"{file}: slerp takes base_model, the one at t = 0, and one other, not {models}")
        if "t" not in common:
            raise ValueError(f"{file}: parameters: t is missing")
        t = common["t"]
        models, base, result["t"] = (
            [base, next(m for m in models if m != base)],
            None,
            t if isinstance(t, list) else [t],
        )
    else:
        if lone := [m for m, weight in zip(models, settings["weight"], strict=True) if weight is None]:
            raise ValueError(f"{file}: models: {lone[0]} has no weight")
        result["weights"] = settings["weight"]
    if method == "linear" and base is not None:
        if base not in models:
            raise ValueError(f"{file}: base_model {base}: linear has no base; list it among models, with a weight")
        base = None
    if method in ("ties", "dare_ties"):
        result["density"] = [1.0 if density is None else density for density in settings["density"]]
    dtype = config.get("out_dtype") or config.get("dtype")
    if dtype not in (None, "bfloat16", "float16", "float32"):
        raise ValueError(f"{file}: dtype {dtype!r} is bfloat16, float16 or float32")
    return result | {"models": models, "base": base, "dtype": dtype, "layers": layers}, notes


def _mapping(file: object, what: str, value: object) -> dict:
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{file}: {what} is a mapping, not {value!r}")
    return dict(value or {})
