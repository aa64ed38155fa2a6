"""Save and restore further objects in checkpoints; see `PeriodicLogger.register`."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from harness.checkpoint.state.kept_tensors import KeptTensors
from harness.checkpoint.state.trainer_state import encode_state
from harness.errors import CheckpointError
from harness.training.state import TrainingContext


class RegisteredObjects:
    """Save, compare and restore the states of registered objects by name.

    Effects: `require_same_on_all_ranks` is collective, the rest is not; main thread; nothing on disk.

    Attributes:
        is_closed: training has begun; only lenient objects may still be registered.
    """

    def __init__(self, context: TrainingContext) -> None:
        self._context = context
        self._objects: dict[str, Any] = {}
        # Names of objects that are left out if they cannot be saved, and of those that a warning was printed for.
        self._lenient: set[str] = set()
        self._left_out: set[str] = set()
        # Name -> state of the restored checkpoint, until training begins.
        self._saved: Mapping[str, Any] = {}
        self.is_closed = False

    @property
    def names(self) -> set[str]:
        """Names of the registered objects."""
        return set(self._objects)

    def register(self, name: str, thing: Any, *, is_lenient: bool) -> None:
        """See `PeriodicLogger.register`."""
        if name in self._objects:
            raise CheckpointError(f"register({name!r}): this name is registered already; give each object its own name")
        if self.is_closed and not is_lenient:
            raise CheckpointError(f"register({name!r}): training has begun; register it before the first batches()")
        _savable_state(name, thing)
        self._objects[name] = thing
        if is_lenient:
            self._lenient.add(name)
        self._load([name])

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Load the states of a checkpoint, also into objects that are registered before training begins."""
        self._saved = saved
        self.restore_again()

    def restore_again(self) -> None:
        """Load the states of the checkpoint again."""
        self._load(self._objects)

    def close(self) -> None:
        """Stop loading saved states, as training has begun."""
        self._saved, self.is_closed = {}, True

    def reopen(self, saved: Mapping[str, Any]) -> None:
        """Load these states into lenient objects that are registered later, as the loop has not trained yet."""
        self._saved = saved

    def _load(self, names: Iterable[str]) -> None:
        for name in names:
            if name in self._saved:
                # Copy: the object may keep and change the tensors, and they may be loaded again.
                self._objects[name].load_state_dict(copy.deepcopy(self._saved[name]))

    def states(self) -> dict[str, Any]:
        """Return name -> current state, not copied; omit lenient objects that cannot be saved, with one warning."""
        found: dict[str, Any] = {}
        for name, thing in self._objects.items():
            if name not in self._lenient:
                found[name] = thing.state_dict()
                continue
            try:
                found[name] = _savable_state(name, thing)
            except CheckpointError as error:
                if name not in self._left_out:
                    self._left_out.add(name)
                    what = type(thing).__name__
                    self._context.warn(f"{what} is left out of checkpoints while its state cannot be saved: {error}")
        return found

    def require_same_on_all_ranks(self) -> None:
        """Compare the ranks' states, as a checkpoint holds rank 0's.

        Effects: collective; main thread; blocks until every rank calls it; copies the states for their hashes.

        Raises:
            CheckpointError: on all ranks, if the state of an object that is not lenient differs.
        """
        collectives = self._context.collectives
        if collectives.world_size == 1 or not self._objects:
            return

        def hashes() -> dict[str, int]:
            found = {}
            for name, state in self.states().items():
                kept = KeptTensors()
                found[name] = kept.hash_with(encode_state(name, state, kept))
            return found

        own = collectives.run_on_all_ranks("reading what is registered", hashes)
        of_ranks = collectives.all_gather("what is registered", own)
        differing: dict[str, int] = {}
        for rank, theirs in enumerate(of_ranks):
            for name in sorted(of_ranks[0].keys() | theirs.keys()):
                if theirs.get(name) != of_ranks[0].get(name):
                    differing.setdefault(name, rank)
        for name, rank in differing.items():
            what = f"the state of {name!r} differs between rank 0 and rank {rank}, and a checkpoint holds rank 0's"
            if name not in self._lenient:
                raise CheckpointError(f"register({name!r}): {what}; keep it the same on all ranks")
            self._context.warn(f"{what}: all ranks resume with it")


def _savable_state(name: str, thing: Any) -> Any:
    try:
        state = thing.state_dict()
    except Exception as error:
        raise CheckpointError(f"register({name!r}): state_dict() raised {type(error).__name__}: {error}") from error
    encode_state(name, state, None)
    return state
