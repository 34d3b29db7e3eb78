"""Whether a processor has kernels for bf16, or torch computes it in a loop."""

import torch


def bf16_is_slow() -> bool:
    """Whether torch multiplies bf16 in a loop on this machine's CPU: where oneDNN has no kernel for it.

    So without AVX-512 (most laptops, AMD before Zen 4): 0.6 against 66 GFLOP/s in fp32 on an EPYC with AVX2. The answer
    is oneDNN's: a measurement came out the other way on a machine under load, and a resumed run has to find the same.
    """
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is None or not torch.backends.mkldnn.is_available() or not supported()
