"""A script on several ranks that has its metrics tracked, and fails."""

from __future__ import annotations

from accelerate import Accelerator

from harness.integrations.accelerate import HarnessTracker

accelerator = Accelerator(log_with=HarnessTracker(run_name="it"))
accelerator.init_trackers("tracked", config={"lr": 0.1})
for step in range(3):
    accelerator.log({"rank": accelerator.process_index}, step=step)
accelerator.wait_for_everyone()
if accelerator.is_main_process:
    raise RuntimeError("fell out")
accelerator.end_training()
