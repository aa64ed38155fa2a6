"""`accelerator.save_state` in a script that is run again: no state is written twice, and names are as they were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from harness.autologging.session import Session


class SavedStates:
    """Stands in for `Accelerator.save_state`.

    accelerate numbers what it names itself (`automatic_checkpoint_naming`), and counts from 0 in each process: the
    number of a run that goes on is in our checkpoint.

    Effects: collective, as the script's own call is; main thread.

    Args:
        session: gives the training that runs.
    """

    def __init__(self, session: Callable[[], Session]) -> None:
        self._session = session

    def save(
        self, original: Callable[..., Any], accelerator: Accelerator, output_dir: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Save, or give what saving has given, where that was done before the run was cut off."""
        session, project = self._session(), accelerator.project_configuration
        memory = session.memory if session.prepared.accelerator is accelerator else None
        if memory is None or memory.num_states is None:
            return original(accelerator, output_dir, *args, **kwargs)
        is_numbered = project.automatic_checkpoint_naming
        if not session.is_behind_what_is_done:
            path = _numbered(accelerator) if is_numbered else Path(output_dir)
            if session.is_replaying or (is_numbered and project.iteration < memory.num_states and path.exists()):
                project.iteration += 1
                return path
        else:
            project.iteration, memory.num_states = max(project.iteration, memory.num_states), None
        if is_numbered:
            # Those that it has saved since its checkpoint are there, and accelerate writes over none.
            while _numbered(accelerator).exists():
                project.iteration += 1
            accelerator.wait_for_everyone()  # or another rank would find what this one is about to make
        return original(accelerator, output_dir, *args, **kwargs)


def _numbered(accelerator: Accelerator) -> Path:
    return Path(str(accelerator.project_dir), "checkpoints", f"checkpoint_{accelerator.save_iteration}")
