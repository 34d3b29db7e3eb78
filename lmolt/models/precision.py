"""Whether a processor has bf16 at the speed of fp32, or computes it in a loop."""

import functools
import time

import torch

SLOWER = 8


@functools.cache
def bf16_is_slow() -> bool:
    """Whether this machine's CPU takes over `SLOWER` times as long for a product in bf16 as in fp32, by measurement.

    Without AVX-512 (most laptops, AMD before Zen 4) torch has no kernel for it: 0.6 against 66 GFLOP/s on an EPYC with
    AVX2. With units for bf16, or AVX-512, it is as fast or faster.
    """
    took = {}
    for dtype in (torch.float32, torch.bfloat16):
        square = torch.ones(192, 192, dtype=dtype)
        times = []
        for _ in range(4):  # the first sets up
            start = time.perf_counter()
            square @ square
            times.append(time.perf_counter() - start)
        took[dtype] = min(times[1:])
    return took[torch.bfloat16] > SLOWER * took[torch.float32]
