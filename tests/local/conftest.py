from __future__ import annotations

import torch

# As in tests/unit: several tests share the machine.
torch.set_num_threads(1)
