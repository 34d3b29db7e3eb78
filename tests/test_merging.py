"""The formulas against literals, against mergekit's written out in torch, and against float64."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lmolt.merging import methods, safetensors_io
from lmolt.merging.checkpoints import Checkpoint
from lmolt.merging.settings import Recipe, check_recipe
from lmolt.merging.verification import plain, units_apart

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
SHAPE = (700, 400)  # more than two pieces


def checkpoint(folder, values, dtype=torch.bfloat16, **config) -> Checkpoint:
    """A folder with one tensor `w` of these values."""
    folder.mkdir()
    save_file({"w": torch.as_tensor(values).to(dtype)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return Checkpoint(folder)


@pytest.fixture(params=DTYPES)
def three(request, tmp_path):
    """(type, [base, A, B, C] as tensors, as checkpoints): deltas a tenth of the weights."""
    torch.manual_seed(1)
    base = torch.randn(SHAPE) * 0.02
    tensors = [x.to(DTYPES[request.param]) for x in (base, *(base + torch.randn(SHAPE) * 0.002 for _ in range(3)))]
    folders = [checkpoint(tmp_path / str(i), x, x.dtype) for i, x in enumerate(tensors)]
    return request.param, tensors, folders


def merge(recipe, models, base=None, dtype="BF16"):
    """The merged tensor `w` in float64 and its record."""
    pieces = []
    check_recipe(recipe, ["w"], len(models), base is not None)
    record = methods.merge_tensor("w", models, base, recipe, dtype, pieces.append)
    return np.concatenate([safetensors_io.decode(piece, dtype, np.float64) for piece in pieces]), record


# --- literals


def literal(tmp_path, recipe, base, *models):
    base = checkpoint(tmp_path / "base", base, torch.float32) if base is not None else None
    models = [checkpoint(tmp_path / str(i), model, torch.float32) for i, model in enumerate(models)]
    return merge(recipe, models, base, "F32")


def test_ties_by_hand(tmp_path):
    """Trim to 2 of 4; the votes 3, -1 elect +; the loser's weight is not in the divisor."""
    recipe = Recipe("ties", [1.0, 0.5], [0.5, 0.5])
    merged, record = literal(tmp_path, recipe, [1.0, 1, 1, 1], [4.0, 1.5, -1, 1], [-1.0, 1.25, 3, 1])
    # deltas 3 .5 -2 0 and -2 .25 2 0; kept 3 0 -2 0 and -2 0 2 0; votes 3 0 -2 0 and -1 0 1 0
    assert merged.tolist() == [4, 1, -1, 1]
    assert record["conflicts"] == 2


def test_ties_without_normalisation_with_lambda(tmp_path):
    recipe = Recipe("ties", [1.0, 0.5], [1.0, 1.0], normalize=False, scale=2.0)
    merged, _ = literal(tmp_path, recipe, [0.0, 0, 0], [1.0, -4, 1], [2.0, 2, -2])
    assert merged.tolist() == [4, -8, 2]  # the last: a sum of 0 elects +


def test_of_equal_magnitudes_the_first_stay(tmp_path):
    recipe = Recipe("ties", [1.0], [0.5])
    merged, _ = literal(tmp_path, recipe, [0.0] * 6, [1.0, -1, 2, 1, 1, -1])
    assert merged.tolist() == [1, -1, 2, 0, 0, 0]


def test_linear_divides_by_the_sum_of_weights(tmp_path):
    merged, _ = literal(tmp_path, Recipe("linear", [3.0, 1.0]), None, [4.0, 8], [0.0, -8])
    assert merged.tolist() == [3, 4]


def test_linear_without_normalisation(tmp_path):
    recipe = Recipe("linear", [3.0, -3.0], normalize=False)
    merged, record = literal(tmp_path, recipe, None, [4.0, 8], [0.0, -8])
    assert merged.tolist() == [12, 48]
    assert methods.effective_weights(np.array(record["inner"])) == pytest.approx([3, -3])


def test_slerp_of_a_right_angle(tmp_path):
    merged, record = literal(tmp_path, Recipe("slerp", [0.5, 0.5]), None, [2.0, 0], [0.0, 3])
    assert merged == pytest.approx([2 * 0.5**0.5, 3 * 0.5**0.5]) and not record["linear"]


def test_slerp_is_linear_where_the_angle_is_small_and_takes_zeros(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    merged, record = literal(tmp_path / "a", Recipe("slerp", [0.75, 0.25]), None, [4.0, 4], [8.0, 8])
    assert merged.tolist() == [5, 5] and record["linear"]
    merged, record = literal(tmp_path / "b", Recipe("slerp", [0.5, 0.5]), None, [0.0, 0], [2.0, 0])
    assert merged == pytest.approx([2 * 0.5**0.5, 0]) and not record["linear"]


def test_dare_keeps_the_expected_delta(tmp_path):
    size = 200_000
    merged, _ = literal(tmp_path, Recipe("dare_ties", [1.0], [0.25]), np.zeros(size), np.ones(size))
    assert (merged > 0).mean() == pytest.approx(0.25, abs=0.005) and len(set(merged.tolist())) == 2
    assert merged.mean() == pytest.approx(1, abs=1e-5)  # what stays is scaled to the sum of all


def test_effective_weights_are_the_fit():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 1000))
    vectors = np.stack([x, y, 0.7 * x - 0.2 * y])
    inner = vectors @ vectors.T
    assert methods.effective_weights(inner) == pytest.approx([0.7, -0.2])
    assert methods.cosines(inner) == pytest.approx([x @ y / np.linalg.norm(x) / np.linalg.norm(y)])


# --- mergekit 0.1.5, its formulas written out


def mergekit_linear(models, weights):
    total = torch.zeros(SHAPE)
    weights = torch.tensor(weights)
    for model, weight in zip(models, weights, strict=True):
        total.addcmul_(model, weight)
    return (total / weights.sum()).to(models[0].dtype)


def mergekit_ties(base, models, weights, density, normalize, scale):
    deltas = []
    for model, rho in zip(models, density, strict=True):
        delta = model - base
        first = torch.argsort(delta.abs().float().flatten(), descending=True, stable=True)
        mask = torch.zeros(delta.numel(), dtype=delta.dtype)
        mask[first[: max(1, int(rho * delta.numel()))]] = 1
        deltas.append(delta * mask.reshape(SHAPE))
    deltas = torch.stack(deltas)
    weights = torch.tensor(weights, dtype=base.dtype)[:, None, None]
    deltas = deltas * weights
    elected = (deltas.sum(dim=0) >= 0).to(base.dtype) * 2 - 1
    mask = deltas.sign() == elected
    mixed, divisor = (deltas * mask).sum(dim=0), (weights * mask).sum(dim=0)
    divisor[divisor == 0] = 1
    if normalize:
        mixed = mixed / divisor
    if scale != 1:
        mixed *= scale
    return base + mixed


def mergekit_slerp(a, b, t):
    x, y = a.float(), b.float()
    theta = torch.acos(((x / x.norm()) * (y / y.norm())).sum())
    return (torch.sin((1 - t) * theta) / theta.sin() * x + torch.sin(t * theta) / theta.sin() * y).to(a.dtype)


@pytest.mark.parametrize("weights", [[0.95, 0.05], [0.5, 0.5], [0.3, 0.5, 0.4]])
def test_linear_is_mergekits_bit_for_bit(three, weights):
    dtype, (_, *tensors), (_, *folders) = three
    count = len(weights)
    merged, _ = merge(Recipe("linear", weights, rounding="mergekit"), folders[:count], dtype=dtype)
    theirs = mergekit_linear(tensors[:count], weights).double().numpy().ravel()
    assert (merged != theirs).sum() == 0


@pytest.mark.parametrize(
    ("weights", "density", "normalize", "scale"),
    [
        ([0.95, 0.05], [0.5, 0.5], True, 1.0),
        ([0.95, 0.05], [0.2, 0.2], False, 1.0),
        ([0.7, 0.3], [1.0, 0.3], True, 0.8),
        ([0.5, 0.3, 0.2], [0.5, 0.2, 0.9], True, 1.0),
        ([1.0, -0.5], [0.5, 0.5], True, 1.0),
    ],
)
def test_ties_is_mergekits_bit_for_bit(three, weights, density, normalize, scale):
    dtype, (base, *tensors), (base_folder, *folders) = three
    count = len(weights)
    recipe = Recipe("ties", weights, density, normalize, scale, "mergekit")
    merged, _ = merge(recipe, folders[:count], base_folder, dtype)
    theirs = mergekit_ties(base, tensors[:count], weights, density, normalize, scale).double().numpy().ravel()
    assert (merged != theirs).sum() == 0


def test_slerp_is_mergekits_but_for_a_rounding(three):
    dtype, (_, a, b, _), (_, *folders) = three
    merged, _ = merge(Recipe("slerp", [0.95, 0.05], rounding="mergekit"), folders[:2], dtype=dtype)
    theirs = mergekit_slerp(a, b, 0.05).double().numpy().ravel()
    if dtype != "F32":  # there the angle, too, is float32 for mergekit: every value moves
        assert (merged != theirs).mean() < 1e-3
    assert np.allclose(merged, theirs, rtol={"BF16": 2**-7, "F16": 2**-10, "F32": 2**-18}[dtype], atol=1e-7)


# --- float64


def exact_ties(base, models, recipe):
    """TIES in float64 torch: another sort, another mask than ours or mergekit's."""
    votes = []
    for model, weight, density in zip(models, recipe.weights, recipe.density, strict=True):
        delta = (model.double() - base.double()).flatten()
        _, first = torch.sort(delta.abs(), descending=True, stable=True)
        rank = torch.empty_like(first).scatter_(0, first, torch.arange(len(first)))
        votes.append(weight * delta * (rank < max(1, int(density * len(first)))))
    votes = torch.stack(votes)
    elected = torch.where(votes.sum(0) < 0, -1.0, 1.0)
    agree = votes * elected > 0
    divisor = (torch.tensor(recipe.weights, dtype=torch.float64)[:, None] * agree).sum(0)
    divisor[divisor == 0] = 1
    return (base.double().flatten() + (votes * agree).sum(0) / divisor).numpy()


@pytest.mark.parametrize("method", ["ties", "slerp", "linear"])
def test_every_value_is_the_float64_formula_rounded_once(three, method):
    dtype, (base, a, b, _), (base_folder, *folders) = three
    recipe = Recipe(method, [0.95, 0.05], [0.5, 0.2])
    origin = base_folder if method == "ties" else None
    merged, _ = merge(recipe, folders[:2], origin, dtype)
    x, y = a.double().flatten(), b.double().flatten()
    if method == "ties":
        exact = exact_ties(base, [a, b], recipe)
    elif method == "linear":
        exact = (0.95 * x + 0.05 * y).numpy()
    else:
        theta = torch.acos(x @ y / x.norm() / y.norm())
        exact = ((torch.sin(0.95 * theta) * x + torch.sin(0.05 * theta) * y) / torch.sin(theta)).numpy()
    assert (units_apart(merged, exact, dtype) > 0.501).mean() <= 1e-3
    assert np.allclose(plain(recipe, "w", folders[:2], origin), exact, rtol=1e-12, atol=1e-15)  # --verify's formula


def test_types_may_be_mixed(tmp_path):
    torch.manual_seed(0)
    a, b = torch.randn(1000), torch.randn(1000)
    folders = [checkpoint(tmp_path / "a", a, torch.float16), checkpoint(tmp_path / "b", b, torch.float32)]
    merged, _ = merge(Recipe("linear", [0.5, 0.5]), folders, dtype="BF16")
    assert merged.tolist() == ((a.half().double() + b.double()) / 2).bfloat16().double().tolist()


# --- the trim


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize(
    "values",
    [
        np.random.default_rng(0).standard_normal(300_000),
        np.random.default_rng(0).integers(-3, 4, 300_000),  # few magnitudes, many ties
        np.zeros(300_000),
        np.repeat([0.0, 1e-30, 5.0], 100_000),  # sorted: a piece is no sample of the whole
        np.sort(np.random.default_rng(0).standard_cauchy(300_000)),
        np.array([3.0]),
        np.array([1.0, -1.0, 2.0]),
    ],
    ids=["normal", "integers", "zeros", "blocks", "sorted", "one", "three"],
)
@pytest.mark.parametrize("density", [0.001, 0.2, 0.5, 0.99])
def test_trim_keeps_what_a_stable_sort_keeps(tmp_path, values, density, kind):
    values = values.astype(np.float32)
    zero = checkpoint(tmp_path / "0", np.zeros_like(values), torch.float32)
    one = checkpoint(tmp_path / "1", values, torch.float32)
    rounding = "once" if kind is np.float64 else "mergekit"
    merged, _ = merge(Recipe("ties", [1.0], [density], rounding=rounding), [one], zero, "F32")
    expected = np.zeros_like(values)
    first = np.argsort(-np.abs(values), kind="stable")[: max(1, int(density * values.size))]
    expected[first] = values[first]
    assert np.array_equal(merged, expected)


@pytest.mark.parametrize("size", [5, 300_001, 70_000])
@pytest.mark.parametrize("density", [0.2, 0.5])
def test_of_equal_magnitudes_the_first_stay_in_bfloat16(tmp_path, size, density):
    """There the values at even places are worked on before those at odd ones."""
    values = np.random.default_rng(1).integers(-2, 3, size).astype(np.float32)
    zero, one = (checkpoint(tmp_path / str(i), x) for i, x in enumerate((np.zeros_like(values), values)))
    merged, _ = merge(Recipe("ties", [1.0], [density]), [one], zero)
    expected = np.zeros_like(values)
    first = np.argsort(-np.abs(values), kind="stable")[: max(1, int(density * size))]
    expected[first] = values[first]
    assert np.array_equal(merged, expected)


# --- storage


@pytest.mark.parametrize("size", [0, 1, 2, 7, 1 << 16])
def test_pairs_are_the_same_values_in_another_order(size):
    bits = np.random.default_rng(0).integers(0, 0x7F80, size, np.uint16)
    values, pairs = safetensors_io.decode(bits, "BF16"), safetensors_io.decode_pairs(bits)
    half = (size + 1) // 2
    assert np.array_equal(pairs[:half], values[::2]) and np.array_equal(pairs[half : half + size // 2], values[1::2])
    third = pairs / np.float32(3)
    expected = safetensors_io.encode(values / np.float32(3), "BF16")
    assert np.array_equal(safetensors_io.encode_pairs(third, size), expected)


def test_bfloat16_rounds_as_torch_does():
    bits = np.arange(0, 1 << 32, 99_991, np.uint64).astype(np.uint32)
    values = bits.view(np.float32)
    values = values[np.isfinite(values)]
    ours = safetensors_io.encode(values, "BF16")
    assert np.array_equal(ours, torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16))
    again = safetensors_io.decode(ours, "BF16")
    assert np.array_equal(safetensors_io.encode(again[np.isfinite(again)], "BF16"), ours[np.isfinite(again)])


# --- DARE, votes, deltas


def test_dare_ties_is_mergekits_given_its_mask(three):
    """mergekit 0.1.5: masked, scaled to the L1 norm, weighted, elected; not divided by default."""
    dtype, (base, a, b, _), (base_folder, *folders) = three
    recipe = Recipe("dare_ties", [0.95, 0.05], [0.5, 0.2], rounding="mergekit", seed=3)
    merged, _ = merge(recipe, folders[:2], base_folder, dtype)
    kept = []
    for index, (model, density) in enumerate(zip((a, b), recipe.density, strict=True)):
        mask = np.concatenate([*methods.dare_mask("w", index, a.numel(), density, 3)])
        delta = model - base
        masked = delta * torch.from_numpy(mask).reshape(SHAPE).to(delta.dtype)
        kept.append(masked * (delta.abs().sum() / masked.abs().sum()))
    votes = torch.stack(kept) * torch.tensor(recipe.weights, dtype=base.dtype)[:, None, None]
    elected = (votes.sum(0) >= 0).to(base.dtype) * 2 - 1
    theirs = (base + (votes * (votes.sign() == elected)).sum(0)).double().numpy().ravel()
    assert not recipe.normalize
    assert (merged != theirs).mean() < (1e-3 if dtype != "F32" else 0.9)  # sums over the tensor add in another order
    assert np.allclose(merged, theirs, rtol={"BF16": 2**-7, "F16": 2**-9, "F32": 2**-20}[dtype], atol=1e-7)


@pytest.mark.parametrize("weights", [[0.3, 0.1], [0.9, 0.3], [0.6, 0.2], [0.4, 0.3, 0.3], [0.5, 0.3, 0.4], [0.3] * 3])
def test_votes_that_tie_are_decided_the_same_way_by_verify(tmp_path, weights):
    """bf16 deltas that are multiples of one another: 0.3 d - 0.1 * 3 d is 0 only in exact arithmetic."""
    generator = np.random.default_rng(5)
    base = torch.from_numpy(generator.standard_normal(40_000)).bfloat16()
    step = 2.0 ** torch.floor(torch.log2(base.float().abs()) - 5)
    models = [base.float() + step * torch.from_numpy(generator.integers(-4, 5, 40_000)) for _ in weights]
    folders = [checkpoint(tmp_path / str(i), x) for i, x in enumerate([base, *models])]
    recipe = Recipe("ties", weights, [1.0] * len(weights))
    merged, record = merge(recipe, folders[1:], folders[0])
    off = units_apart(merged, plain(recipe, "w", folders[1:], folders[0]), "BF16") > 0.501
    assert off.mean() <= 1e-3 and record["conflicts"] > 0


@pytest.mark.parametrize("method", ["task_arithmetic", "nuslerp", "dare_ties", "ties", "slerp", "linear"])
def test_verifys_formula_is_the_merges(three, method):
    dtype, _, (base, *folders) = three
    recipe = Recipe(method, [0.95, 0.05], [0.5, 0.2], scale=1.0 if method in ("slerp", "linear") else 0.7)
    origin = None if method in ("slerp", "linear") else base
    merged, _ = merge(recipe, folders[:2], origin, dtype)
    exact = plain(recipe, "w", folders[:2], origin)
    if method != "nuslerp":
        assert (units_apart(merged, exact, dtype) > 0.501).mean() <= 1e-3
    else:  # lambda isn't mergekit's there
        assert (units_apart(merged, exact, dtype) > 0.501).mean() <= 1e-3


def test_task_arithmetic_is_mergekits_bit_for_bit(three):
    dtype, (base, *tensors), (base_folder, *folders) = three
    weights = [0.5, 0.3, 0.2]
    recipe = Recipe("task_arithmetic", weights, scale=0.8, rounding="mergekit")
    merged, _ = merge(recipe, folders, base_folder, dtype)
    deltas = torch.stack([model - base for model in tensors]) * torch.tensor(weights, dtype=base.dtype)[:, None, None]
    theirs = (base + deltas.sum(0) * 0.8).double().numpy().ravel()
    assert (merged != theirs).mean() < 1e-3  # torch adds three bf16 in float32, and rounds once


def test_nuslerp_turns_the_task_vector(tmp_path):
    recipe = Recipe("nuslerp", [0.5, 0.5])
    merged, record = literal(tmp_path, recipe, [1.0, 1], [3.0, 1], [1.0, 4])
    assert merged == pytest.approx([1 + 2 * 0.5**0.5, 1 + 3 * 0.5**0.5]) and not record["linear"]


# --- what was stored


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_values_equal_to_the_first_are_counted_where_their_number_is_odd(tmp_path, dtype):
    first, second = torch.tensor([1.0, 2, 3, -0.0, 7]), torch.tensor([1.0, 4, 3, 0.0, 7])
    folders = [checkpoint(tmp_path / name, x.bfloat16()) for name, x in (("a", first), ("b", second))]
    record = methods.merge_tensor("w", folders, None, Recipe("linear", [0.5, 0.5]), dtype, lambda _: None)
    assert (record["equal"], record["looked"]) == (3, 5)  # 2 is 3 now, and -0 is 0, which has other bits


def test_a_slerp_beyond_the_types_range_is_refused(tmp_path):
    """A norm below 2^15 tells that no value can be; of larger ones, each value is looked at."""
    folders = [checkpoint(tmp_path / str(i), torch.tensor(x)) for i, x in enumerate([[6e4, 0.0], [0.0, 7e4]])]
    with pytest.raises(ValueError, match="leave the range of F16"):
        methods.merge_tensor("w", folders, None, Recipe("slerp", [0.0, 1.0]), "F16", lambda _: None)


def stored_weights(records, dtype="BF16"):
    from lmolt.merging.provenance import summarise

    return summarise(records, dtype, "base")["total"]


@pytest.mark.parametrize(
    ("size", "expected"), [(0.1, 0.05), (0.01, 0.02), (0.003, 0.006)], ids=["10 %", "1 %", "0.3 %"]
)
@pytest.mark.parametrize("with_base", [True, False])
def test_the_stored_ratio_is_what_is_reported(tmp_path, size, expected, with_base):
    """SLERP 19:1 with deltas of that share of the weights: bf16 keeps less of the second model than was asked for."""
    torch.manual_seed(0)
    base = torch.randn(400_000).mul(0.02).bfloat16()
    tensors = [(base.float() + size * 0.02 * torch.randn(400_000)).bfloat16() for _ in "ab"]
    folders = [checkpoint(tmp_path / str(i), x) for i, x in enumerate([*tensors, base])]
    pieces, recipe = [], Recipe("slerp", [0.95, 0.05])
    record = methods.merge_tensor(
        "w", folders[:2], None, recipe, "BF16", pieces.append, folders[2] if with_base else None
    )
    total = stored_weights([{"tensor": "w", **record}])
    merged = np.concatenate([safetensors_io.decode(piece, "BF16", np.float64) for piece in pieces])
    a, b, o = (x.double().numpy() for x in (*tensors, base))
    looked = np.concatenate([np.arange(i, min(i + (1 << 16), a.size)) for i in range(0, a.size, methods.FITTED << 16)])
    deltas = np.stack([a - o, b - o])[:, looked]
    mine = np.linalg.lstsq(deltas.T, (merged - o)[looked], rcond=None)[0]
    assert total["asked_weights"] == pytest.approx([0.95, 0.05])
    assert total["effective_weights"][1] == pytest.approx(expected, rel=0.35)
    assert total["effective_weights"] == pytest.approx(mine if with_base else [1 - mine[1], mine[1]], abs=4e-3)
    assert total["equal_to_first"] == pytest.approx((merged == a)[looked].mean())


def test_stochastic_rounding_is_right_on_average(tmp_path):
    """The expected value of each stored number is the exact one; the same seed gives the same bytes."""
    exact = np.float32(1.0) + np.arange(16, dtype=np.float32) / 16 * np.float32(2**-7)  # between two bf16 values
    many = np.repeat(np.concatenate([exact, -exact]), 20_000)
    for dtype, width in (("BF16", 2.0**-7), ("F16", 2.0**-10)):
        values = many if dtype == "BF16" else np.sign(many) * (1 + (np.abs(many) - 1) / 8)
        stored = safetensors_io.encode_at_random(values, dtype, np.random.default_rng(1))
        error = (safetensors_io.decode(stored, dtype, np.float64) - values).reshape(32, -1)
        assert np.abs(error).max() < width
        assert np.abs(error.mean(axis=1)).max() < 5 * width / 2 / np.sqrt(20_000)
        again = safetensors_io.encode_at_random(values, dtype, np.random.default_rng(1))
        assert np.array_equal(stored, again)


def test_stochastic_rounding_keeps_the_ratio(tmp_path):
    torch.manual_seed(0)
    base = torch.randn(400_000).mul(0.02).bfloat16()
    tensors = [(base.float() + 0.01 * 0.02 * torch.randn(400_000)).bfloat16() for _ in "ab"]
    folders = [checkpoint(tmp_path / str(i), x) for i, x in enumerate([*tensors, base])]
    recipe = Recipe("slerp", [0.95, 0.05], rounding="stochastic")
    record = methods.merge_tensor("w", folders[:2], None, recipe, "BF16", lambda piece: None, folders[2])
    assert stored_weights([{"tensor": "w", **record}])["effective_weights"] == pytest.approx([0.95, 0.05], abs=8e-3)


def test_equal_models_have_no_weights(tmp_path):
    folders = [checkpoint(tmp_path / str(i), np.ones(100)) for i in range(2)]
    record = methods.merge_tensor("w", folders, None, Recipe("slerp", [0.95, 0.05]), "BF16", lambda piece: None)
    total = stored_weights([{"tensor": "w", **record}])
    assert total["effective_weights"] is None and total["equal_to_first"] == 1


def test_inputs_of_several_shapes_and_weights_by_tensor(tmp_path):
    """The whole's weights are those of all tensors, each as large as its deltas are."""
    torch.manual_seed(0)
    records, folders = [], []
    for i in range(2):
        (tmp_path / str(i)).mkdir()
        save_file(
            {"layers.0.w": torch.randn(100), "layers.1.w": torch.randn(300)}, tmp_path / str(i) / "model.safetensors"
        )
        (tmp_path / str(i) / "config.json").write_text("{}")
        folders.append(Checkpoint(tmp_path / str(i)))
    recipe = Recipe("linear", [[1.0, 0.0], [0.0, 1.0]])
    check_recipe(recipe, ["layers.0.w", "layers.1.w"], 2, False)
    for name in ("layers.0.w", "layers.1.w"):
        record = methods.merge_tensor(name, folders, None, recipe, "F32", lambda piece: None)
        records.append({"tensor": name, **record})
    total = stored_weights(records, "F32")
    assert total["effective_weights"] == pytest.approx(total["asked_weights"], abs=1e-6)
    assert total["effective_weights"][1] == pytest.approx(0.75, abs=0.1)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_kth_largest_magnitude_by_its_bits(dtype):
    """Values that share their first 16 bits, some of them equal, in two pieces; against sorting."""
    values = np.array([1, 1 + 2**-20, 1 + 2**-20, 1 + 2**-21, 2, 0.5, 1 + 2**-20, 0, 3, 1], dtype)
    pieces = lambda: iter([values[:4], values[4:]])
    descending = np.sort(values)[::-1]
    for k in range(1, len(values) + 1):
        kth = descending[k - 1]
        assert methods.radix_select(pieces, k) == (kth, k - int((values > kth).sum()))
