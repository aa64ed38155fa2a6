"""The rendezvous of this start of the ranks, for scripts that create their own `Accelerator`."""

from harness.distributed.rendezvous import init_method as init_method
