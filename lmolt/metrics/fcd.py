"""Fréchet ChemNet Distance (Preuer et al. 2018) with fcd's network, in two conventions that give different numbers.

fcd 1.2.2 encodes the whole SMILES and pads each list to max(350, its own longest + 1). fcd 1.1, that of L+M-24 and
most published numbers, encodes the first fragment, at most 349 symbols, and pads to 350. ChemNet's last state depends
on the padding, so neither can be had from the other.

The way of data, for B molecules of one length and T = padding / 4 steps:
    one-hot (B, 4 t, 35), t <= T steps that are not all padding    conv, conv -> (B, t, 32)
    LSTM from the end to the start, 128: its states over the padding are the same for all, computed once
    LSTM from the start to the end, 512: its last state is the activation (B, 512)
    Gaussian fit of each list, Fréchet distance
"""

import hashlib
import re
from pathlib import Path

import numpy as np

from lmolt.metrics.cache import load_arrays, save_arrays
from lmolt.metrics.metric import Metric

_OF = "valid predictions, canonical SMILES, RDKit {rdkit}"
METRICS = (
    Metric(
        key="fcd_1_1",
        label="FCD",
        better=-1,
        decimals=2,
        convention=f"fcd 1.1 (the paper's, MolT5's, L+M-24's): first fragment, 349 symbols, padded to 350; {_OF}",
        paper=True,
    ),
    Metric(
        key="fcd",
        label="FCD (fcd 1.2.2)",
        better=-1,
        decimals=2,
        convention="fcd 1.2.2: whole SMILES, each list padded to max(350, its longest + 1), so that the longest string "
        f"of either side moves the number; {_OF}",
    ),
)
RULES = {"fcd_1_1": "1.1", "fcd": "1.2.2"}  # key: version of fcd that has it

_SYMBOLS = re.findall("Cl|Br|Si|.", "CNOHFClPBBrSISi#()+-12345678=[]@cnosX.")  # in the order of ChemNet's inputs
_NUMBER = {symbol: i for i, symbol in enumerate(_SYMBOLS)}
_UNKNOWN = _NUMBER["X"]
_PADDING = 350
_BATCH, _CHUNK = 128, 16  # molecules of like length at once; steps of padding at once


def encode(smiles: list[str], convention: str) -> tuple[list[list[int]], int]:
    """Symbol numbers of each canonical SMILES, the end symbol included, and the length they are padded to."""
    if convention == "1.2.2":
        rows = [re.findall("Br|Cl|Si|.", s + ".") for s in smiles]
        padding = max(_PADDING, max(map(len, smiles)) + 1)
    else:
        rows = [re.findall(".[ril]|.", s.partition(".")[0])[: _PADDING - 1] + ["."] for s in smiles]
        padding = _PADDING
    return [[_NUMBER.get(symbol, _UNKNOWN) for symbol in row] for row in rows], padding


def activations(smiles: list[str], convention: str) -> np.ndarray:
    """ChemNet's activations of n canonical SMILES, `(n, 512)` float32; equal SMILES are computed once."""
    import torch
    from fcd import load_ref_model

    distinct = {s: i for i, s in enumerate(dict.fromkeys(smiles))}
    rows, padding = encode(list(distinct), convention)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_ref_model().to(device)  # conv, SELU, conv, SELU, flip, LSTM, flip, LSTM
    convolutions, backward, forward = model[:7], model[8], model[11]
    steps = -(-padding // 4)
    result = torch.empty(len(rows), 512)
    with torch.inference_mode():
        padded = _padding_states(backward, steps, device)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        for start in range(0, len(order), _BATCH):
            batch = order[start : start + _BATCH]
            # Two strided convolutions of width 4 see no symbol beyond this step, and have no bias.
            own = min(-(-len(rows[batch[-1]]) // 4) + 2, steps)
            one_hot = torch.zeros(len(batch), min(4 * own, padding), len(_SYMBOLS))
            for b, i in enumerate(batch):
                one_hot[b, range(len(rows[i])), rows[i]] = 1 / len(_SYMBOLS)
            features = convolutions(one_hot.to(device).transpose(1, 2))  # (B, own, 32)
            state = [s[steps - own].expand(1, len(batch), -1).contiguous() for s in padded]
            seen = backward(features.flip(1), tuple(state))[0].flip(1)  # (B, own, 128)
            result[batch] = _run_forward(forward, seen, padded[0][1 : steps - own + 1].flip(0)).cpu()
    return result.numpy()[[distinct[s] for s in smiles]]


def _padding_states(backward, steps: int, device: str):
    """Hidden and cell states of the backward LSTM after 0 to `steps` steps of padding, `(steps + 1, 128)` each."""
    import torch

    state = (torch.zeros(1, 1, 128, device=device), torch.zeros(1, 1, 128, device=device))
    history = [state]
    for _ in range(steps):
        state = backward(torch.zeros(1, 1, 32, device=device), state)[1]
        history.append(state)
    return [torch.cat([h[k][0] for h in history]) for k in range(2)]


def _run_forward(lstm, seen, shared):
    """Last hidden state `(B, 512)` of the LSTM over `seen` `(B, t, 128)` and then `shared` `(T - t, 128)`.

    All molecules share the inputs over the padding, so their projection W x is computed once a step, and enters the
    LSTM as the weight of a one-hot input: a fifth less work.
    """
    import torch

    state = (seen.new_zeros(1, len(seen), 512), seen.new_zeros(1, len(seen), 512))
    weight_in, weight_hidden, bias_in, bias_hidden = lstm.all_weights[0]
    for chunk in seen.split(64, 1):
        state = lstm(chunk, state)[1]
    for chunk in shared.split(_CHUNK) if len(shared) else ():
        one_hot = torch.eye(len(chunk), device=seen.device).expand(len(seen), -1, -1)
        weights = [(chunk @ weight_in.T).T.contiguous(), weight_hidden, bias_in, bias_hidden]
        state = torch.lstm(one_hot, state, weights, True, 1, 0.0, False, False, True)[1:]
    return state[0][0]


def gaussian(smiles: list[str], convention: str, cache_dir=None) -> tuple[np.ndarray, np.ndarray]:
    """Mean `(512,)` and covariance `(512, 512)` of n >= 2 molecules' activations, kept in `cache_dir` if given."""
    path = None
    if cache_dir is not None:
        content = hashlib.sha256("\n".join([convention, *smiles]).encode()).hexdigest()[:32]
        path = Path(cache_dir) / f"chemnet-{content}.npz"
        if stored := load_arrays(path):
            return stored["mean"], stored["covariance"]
    acts = activations(smiles, convention)
    mean, covariance = acts.mean(0), np.cov(acts.T)
    if path is not None:
        save_arrays(path, {"mean": mean, "covariance": covariance})
    return mean, covariance


def frechet(gaussian_a: tuple, gaussian_b: tuple) -> float:
    """|m_a - m_b|^2 + Tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of two Gaussians.

    The trace of the root is the sum of roots of the eigenvalues of C_a^(1/2) C_b C_a^(1/2), which is symmetric:
    faster than a matrix square root, and never the "imaginary component" that small sets raise in fcd.
    """
    (mean_a, cov_a), (mean_b, cov_b) = gaussian_a, gaussian_b
    values, vectors = np.linalg.eigh(cov_a)
    root = vectors * np.sqrt(np.maximum(values, 0))  # root @ root.T = C_a; root.T C_b root has the same eigenvalues
    product = np.linalg.eigvalsh(root.T @ cov_b @ root)
    trace = np.sqrt(np.maximum(product, 0)).sum()
    difference = (mean_a - mean_b).astype(float)
    return float(difference @ difference + np.trace(cov_a) + np.trace(cov_b) - 2 * trace)


def distance(references: list[str], predictions: list[str], convention: str, cache_dir=None) -> float:
    """FCD between two lists of canonical SMILES; NaN where either has fewer than two (no covariance)."""
    if min(len(references), len(predictions)) < 2:
        return float("nan")
    return max(0.0, frechet(gaussian(references, convention, cache_dir), gaussian(predictions, convention)))
