"""What a run costs: wall time, tokens, floating-point operations, peak memory, energy."""

import json
import math
import sys
import time
from pathlib import Path

import torch


class Efficiency:
    """Wall time, tokens, floating-point operations, peak memory and energy of a run, across its resumptions.

    Operations are counted as 2 P a token forward, 2 P backward through activations and 2 P_trainable for the
    gradients of weights; attention's own products, a few per cent at these lengths, are left out.
    """

    def __init__(self, model):
        self.n_parameters = sum(_true_size(p) for p in model.parameters())
        self.n_trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.wall_seconds = 0.0
        self.packed_tokens = self.scored_tokens = self.padding_tokens = 0
        self._flops = 0.0
        self._energy_at_start = _gpu_energy_joules()
        self._energy_before = 0.0
        self._started = self._last = time.perf_counter()
        self._tokens_last = 0

    def count(self, packed: int, scored: int, padding: int = 0) -> None:
        self.packed_tokens += packed
        self.scored_tokens += scored
        self.padding_tokens += padding
        forward = 2 * self.n_parameters * (packed + padding)
        self._flops += forward
        if torch.is_grad_enabled():
            self._flops += forward + 2 * self.n_trainable * (packed + padding)

    def count_padded(self, sequences) -> None:
        lengths = [len(prompt) + len(output) for prompt, output in sequences]
        padding = max(lengths) * len(lengths) - sum(lengths)
        self.count(sum(lengths), sum(len(output) for _, output in sequences), padding)

    def drain_flops(self) -> float:
        flops, self._flops = self._flops, 0.0
        return flops

    def rates(self) -> dict[str, float]:
        """Scored tokens a second since the last call (this rank), share of padding, peak memory in GiB."""
        now, tokens = time.perf_counter(), self.scored_tokens
        rate = (tokens - self._tokens_last) / max(now - self._last, 1e-9)
        self._last, self._tokens_last = now, tokens
        padded = self.padding_tokens / max(self.packed_tokens + self.padding_tokens, 1)
        return {"tokens_per_second": rate, "padding": padded, "peak_memory_gib": peak_memory_bytes() / 2**30}

    def summary(self, accelerator, flops: float) -> dict:
        """Of all processes together (each has to call it); memory is that of the one which took most."""
        energy = _gpu_energy_joules()
        energy = math.nan if energy is None else energy + self._energy_before - self._energy_at_start
        counts = [self.packed_tokens, self.scored_tokens, self.padding_tokens, energy]
        of_all = lambda values, how: accelerator.reduce(
            torch.tensor(values, dtype=torch.float64, device=accelerator.device), how
        ).tolist()
        *counts, energy = of_all(counts, "sum")
        packed, scored, padding = map(int, counts)
        wall = self.wall_seconds + time.perf_counter() - self._started
        return {
            "processes": accelerator.num_processes,
            "wall_seconds": wall,
            "tokens": packed,
            "scored_tokens": scored,
            "padding_tokens": padding,
            "scored_tokens_per_second": scored / max(wall, 1e-9),
            "flops": flops,
            "peak_memory_bytes": int(of_all([peak_memory_bytes()], "max")[0]),
            "gpu_energy_joules": None if math.isnan(energy) else energy,
            "n_parameters": self.n_parameters,
            "n_trainable": self.n_trainable,
        }

    def resume_from(self, path: Path) -> None:
        """Go on counting where an interrupted run stood at its checkpoint; for one process, which counts for all."""
        before = json.loads(path.read_text())
        self.wall_seconds = before["wall_seconds"]
        self.packed_tokens, self.scored_tokens = before["tokens"], before["scored_tokens"]
        self.padding_tokens, self._tokens_last = before["padding_tokens"], before["scored_tokens"]
        self._energy_before = before["gpu_energy_joules"] or 0.0


def peak_memory_bytes() -> int:
    """Of this process: the GPU's allocator where there is one, else the resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource  # here: Windows has none

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _true_size(parameter: torch.nn.Parameter) -> int:
    """Numbers in a parameter, also where 4-bit storage packs them or ZeRO-3 keeps them elsewhere."""
    state = getattr(parameter, "quant_state", None)
    return state.shape.numel() if state is not None else getattr(parameter, "ds_numel", parameter.numel())


def _gpu_energy_joules() -> float | None:
    """Energy that this process's GPU has drawn since its driver loaded; None where NVML can't tell."""
    if not torch.cuda.is_available():
        return None
    import pynvml  # the package nvidia-ml-py

    try:
        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")  # NVML's indices know no CUDA_VISIBLE_DEVICES
        return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
    except pynvml.NVMLError:
        return None
