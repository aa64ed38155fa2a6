"""DeepSpeed on a CPU, for scripts that create their own `Accelerator`."""

from harness.distributed.cpu_strategies import prepare_deepspeed as prepare_deepspeed
