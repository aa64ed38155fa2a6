"""What DeepSpeed's ranks import, imported once by the process that they are forked from: 7 s in each rank.

Not imported by the tests themselves: there its warnings are errors.
"""

import importlib

from harness.distributed.cpu_strategies import prepare_deepspeed

prepare_deepspeed()
for _module in ("torch._dynamo", "transformers", "deepspeed.runtime.zero.muon.muon_optimizer"):
    importlib.import_module(_module)
