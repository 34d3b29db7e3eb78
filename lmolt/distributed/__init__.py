"""Several processes and machines: strategies, supervision, preemption."""
