"""`cpu_shim.py SCRIPT ...`: takes accelerate's path of several GPUs on CPUs and gloo: FSDP2 can be tested anywhere."""

import os
import runpy
import sys

os.environ.setdefault("ACCELERATE_TORCH_DEVICE", "cpu")

from accelerate.state import DistributedType, PartialState  # noqa: E402

PartialState._prepare_backend = lambda self, cpu, sagemaker, backend=None: ("gloo", DistributedType.MULTI_GPU)
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
runpy.run_path(sys.argv[0], run_name="__main__")
