"""python fsdp_on_cpu.py SCRIPT ARGS: runs a script with FSDP2 over gloo, which torch can do and accelerate won't.

accelerate takes FSDP for processes that have GPUs and DDP for those that haven't; here it is told that they have.
"""

import runpy
import sys

from accelerate import DistributedType, PartialState

plain_init = PartialState.__init__


def init(self, *args, **kwargs):
    plain_init(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


PartialState.__init__ = init
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
