"""Which bytes of which tensor a rank holds: one answer for each strategy, behind one function.

Read in this order: `source` (what is said of one tensor), `state_form` (optimizer state in containers), `held` (of
all), and the answers: `plain` with `dtensor` (single, DDP, FSDP2, HSDP, tensor parallelism), `fsdp1`, and `zero`
(DeepSpeed ZeRO-1, 2, 3). `parts` merges the answers for several models.
"""
