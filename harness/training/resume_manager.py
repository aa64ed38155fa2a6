"""What a run goes on from: found as it starts, put back as it is watched, used up by its first batch.

start    ->  find             the run's own checkpoints, or the one that was named
watch    ->  put_back         tensors, optimizer, scheduler; or initial weights; or nothing
register ->  register         the state of whatever else goes on
batches  ->  is_done, take    loaders of the epoch that were done; where the next one goes on
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from harness.checkpoint.format.names import some
from harness.checkpoint.restore.locate import Found, find_checkpoints, locate, locate_weights
from harness.checkpoint.restore.remote_files import RemoteFiles
from harness.checkpoint.restore.restore import restore_weights
from harness.checkpoint.restore.restore_trainer import put_back
from harness.checkpoint.restore.resume import PreviousRun, Resumed, look_before, resume, set_damaged_aside
from harness.checkpoint.restore.visibility import open_weights, refuse_others_alone
from harness.checkpoint.state.kept_tensors import KeptTensors
from harness.checkpoint.state.parts import find_watched
from harness.checkpoint.state.trainer_state import AnyWatched, TrainerState, encode_state
from harness.data import dataloaders
from harness.data.resumable_loader import ResumePoint
from harness.distributed.collectives import Collectives
from harness.errors import CheckpointError


class ResumeManager:
    """How a run goes on from a checkpoint, or begins.

    Effects: `find` and `put_back` are collective; main thread; they block for reading; nothing on disk but what
    is downloaded.

    Args:
        accelerator: of the loop.
        collectives: of all ranks.
        run_path: the run's directory.
        resume_from: ``auto``, ``never``, or where a run begins.
        initial_weights: what a run that begins takes its weights from; None: what they are.
        tracking_uri: of MLflow; None: as MLflow finds it.
        resets_scheduler: take the schedulers' course as they are made now, in place of the checkpoint's.
        say: a line for the user.

    Attributes:
        before: what is known of the run that goes on before anything is put back; empty: it begins.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        collectives: Collectives,
        run_path: Path,
        resume_from: str,
        initial_weights: str | None,
        tracking_uri: str | None,
        resets_scheduler: bool,
        say: Callable[[str], None],
    ) -> None:
        self._accelerator = accelerator
        self._collectives = collectives
        self._run_path = run_path
        self._resume_from = resume_from
        self._initial_weights = initial_weights
        self._tracking_uri = tracking_uri
        self._resets_scheduler = resets_scheduler
        self._say = say
        self._relay = RemoteFiles(collectives)
        self._found: Found | None = None
        self._resumed: Resumed | None = None
        self._registered: dict[str, Any] = {}
        # Of these, the ones that are left out where they cannot be saved; and for which that has been said.
        self._lenient: set[str] = set()
        self._left_out: set[str] = set()
        self._watched: AnyWatched | None = None
        self._is_over = False
        self._taken: Resumed | None = None
        self.before = PreviousRun()

    def find(self) -> None:
        """Find what there is to go on from; rank zero looks.

        Raises:
            HarnessError: on all ranks, if what the user has named is not there.
        """
        self._found, self.before = self._collectives.broadcast_from_rank_zero("find the checkpoints", self._find)
        if self._found.is_empty:
            refuse_others_alone(self._run_path / "checkpoints", self._collectives)

    def _find(self) -> tuple[Found, PreviousRun]:
        found = find_checkpoints(self._run_path / "checkpoints")
        for _, reason in found.damaged:
            self._say(f"harness: warning: {reason}")
        if self._resume_from not in ("auto", "never"):
            if found.usable:
                self._say(f"the run has checkpoints of its own, and goes on from these, not from {self._resume_from}")
            elif found.is_empty:
                downloads = self._run_path / "downloads"
                usable = locate("resume_from_checkpoint", self._resume_from, downloads, self._tracking_uri)
                found = replace(found, usable=usable)
        return found, look_before(found.usable)

    def put_back(self, watched: AnyWatched) -> Resumed | None:
        """Fill what is watched with the newest checkpoint, or with the initial weights; None: the run begins.

        Raises:
            CheckpointError: on all ranks, if none of the checkpoints can be put back.
        """
        assert self._found is not None
        self._resumed = resume(
            self._found,
            self._accelerator,
            self._collectives,
            watched,
            self._relay,
            self._say,
            resets_scheduler=self._resets_scheduler,
        )
        if self._resumed is None:
            self._take_initial_weights(watched)
            return None
        if self._initial_weights is not None:
            self._say(f"the run goes on, so initial_weights ({self._initial_weights}) is not looked at")
        self._watched = watched
        self._load_registered()
        return self._resumed

    def leave(self) -> frozenset[str]:
        """Put nothing back: the loop has done it by itself. Names of the checkpoints that the run has.

        Effects: not collective; what is damaged is set aside by rank zero, as `put_back` does.
        """
        assert self._found is not None
        if self._collectives.rank == 0:
            set_damaged_aside([path for path, _ in self._found.damaged], self._say)
        return frozenset(path.name for path in (*self._found.usable, *self._found.weights_alone))

    def put_back_again(self, watched: AnyWatched) -> None:
        """Put back once more what is no tensor, and what is registered; before the first `take`. Not collective."""
        if self._resumed is not None:
            held = find_watched(self._accelerator, watched, weights_only=False, dtype=None)
            put_back(self._resumed.state, watched, held.groups, self._accelerator.scaler)
            self._load_registered()

    def _take_initial_weights(self, watched: AnyWatched) -> None:
        where = self._initial_weights
        if where is None:
            return
        path = self._collectives.broadcast_from_rank_zero(
            "find the initial weights",
            lambda: locate_weights("initial_weights", where, self._run_path / "downloads", self._tracking_uri),
        )
        records, files = open_weights(path, self._collectives, self._relay, self._say)
        restored = restore_weights(self._accelerator, watched, path, self._collectives, records, files)
        self._say(f"begins with the weights of {where}")
        for note in restored.notes:
            self._say(f"harness: warning: {where}: {note}")

    # --------------------------------------------------------------- what else goes on

    def register(self, name: str, thing: Any, *, is_lenient: bool = False) -> None:
        """Have checkpoints hold a thing's state; where the run goes on it is loaded, here or in `put_back`.

        Args:
            name: of its own.
            thing: with `state_dict` and `load_state_dict`.
            is_lenient: rank 0's state is saved where the ranks' differ, the thing is left out of a checkpoint where its
                state can no longer be saved, and it may be registered once training has begun, when no saved state is
                loaded any more; False: all three are errors.

        Raises:
            CheckpointError: if its state cannot be saved, the name is taken, or training has begun.
        """
        if name in self._registered:
            raise CheckpointError(f"register({name!r}): there is another thing of that name; give it a name of its own")
        if self._is_over and not is_lenient:
            raise CheckpointError(f"register({name!r}): training has begun; register it before the first batches()")
        _savable_state(name, thing)
        self._registered[name] = thing
        if is_lenient:
            self._lenient.add(name)
        self._load_registered([name])

    def _load_registered(self, names: Iterable[str] | None = None) -> None:
        saved = {} if self._resumed is None else self._resumed.state.registered
        for name in self._registered if names is None else names:
            if name in saved:
                # A copy: the thing may keep the tensors and change them, and this may be called again.
                self._registered[name].load_state_dict(copy.deepcopy(saved[name]))

    def states(self) -> dict[str, Any]:
        """Name -> state of all that is registered, as it is now; not copied.

        A lenient one whose state cannot be saved now is left out, with a line once.
        """
        found: dict[str, Any] = {}
        for name, thing in self._registered.items():
            if name not in self._lenient:
                found[name] = thing.state_dict()
                continue
            try:
                found[name] = _savable_state(name, thing)
            except CheckpointError as error:
                self._say_that_it_is_left_out(name, error)
        return found

    def _say_that_it_is_left_out(self, name: str, error: CheckpointError) -> None:
        if name not in self._left_out:
            self._left_out.add(name)
            what = type(self._registered[name]).__name__
            self._say(f"harness: warning: {what} is left out of checkpoints while its state cannot be saved: {error}")

    def require_alike(self) -> None:
        """Compare the ranks' states of what is registered: a checkpoint holds rank 0's.

        Effects: collective; main thread; blocks until every rank has called it; copies the states for their hashes.

        Raises:
            CheckpointError: on all ranks, if one of them differs, and its thing was not registered as lenient.
        """
        if self._collectives.world_size == 1 or not self._registered:
            return

        def hashes() -> dict[str, int]:
            found = {}
            for name, state in self.states().items():
                kept = KeptTensors()
                found[name] = kept.hash_with(encode_state(name, state, kept))
            return found

        mine = self._collectives.run_on_all_ranks("reading what is registered", hashes)
        of_ranks = self._collectives.all_gather("what is registered", mine)
        differing: dict[str, int] = {}
        for rank, theirs in enumerate(of_ranks):
            for name in sorted(of_ranks[0].keys() | theirs.keys()):
                if theirs.get(name) != of_ranks[0].get(name):
                    differing.setdefault(name, rank)
        for name, rank in differing.items():
            what = f"the state of {name!r} differs between rank 0 and rank {rank}, and a checkpoint holds rank 0's"
            if name not in self._lenient:
                raise CheckpointError(f"register({name!r}): {what}; keep it the same on all ranks")
            self._say(f"harness: warning: {what}: all ranks resume with it")

    # ----------------------------------------------------------------- place in the data

    def is_done(self, number: int) -> bool:
        """Whether the epoch's training loader of that number, from 0, was done before the run was cut off."""
        return self._resumed is not None and number < self._resumed.state.loaders_done

    def end(self) -> None:
        """The epoch that was gone on with is over."""
        self._begin_training()

    def _begin_training(self) -> Resumed | None:
        resumed, self._resumed = self._resumed, None
        if not self._is_over:
            self._is_over = True
            self._say_what_is_one_sided(resumed)
        return resumed

    def take(self, loader: Any) -> ResumePoint | None:
        """Where the loader that begins goes on, once after a resume: at its batch by this loader's size."""
        is_again = self._taken is not None
        resumed = self._taken = self._begin_training()
        if resumed is None:
            return None
        say = (lambda line: None) if is_again else self._say
        state, world_size = resumed.state, self._collectives.world_size
        now = dataloaders.global_batch_size(loader, world_size)
        if not is_again:
            self._say_if_step_is_another(resumed, now)
        num_taken, before = state.batches_in_epoch, state.samples_per_batch
        if before is None or now is None:
            # Nothing is known of the batches but how many ranks took one each.
            before, now = len(state.ranks), world_size
        if num_taken and before != now:
            num_taken, left = divmod(num_taken * before, now)
            again = f"; {left} samples come again" if left else ""
            say(f"harness: the epoch goes on at batch {num_taken}{again}")
        had_generators = any(resumed.data.generators[state.loaders_done : state.loaders_done + 1])
        if num_taken and resumed.rank_state is None and dataloaders.has_random_order(loader) and not had_generators:
            say(
                "harness: warning: the order of the data comes from the random numbers of each process, and is a new "
                "one on another number of ranks: samples of this epoch may come again, or not at all; "
                "DataLoaderConfiguration(use_seedable_sampler=True) keeps it"
            )
        own = resumed.rank_state
        return ResumePoint(num_taken, resumed.data, None if own is None else own.random)

    def give_back(self) -> Resumed | None:
        """What `take` has given last was not trained on: the next loader goes on with it. None: it gave nothing."""
        self._resumed = self._taken
        return self._taken

    def say_that_nothing_is_left(self, num_taken: int) -> None:
        """The loader that the run goes on in has no batch behind those that are done."""
        self._say(
            f"harness: warning: {num_taken} batches of this epoch were done, and its loader now has no more than "
            "that: the run continues with the next epoch"
        )

    def _say_if_step_is_another(self, resumed: Resumed, samples_now: int | None) -> None:
        state = resumed.state
        if samples_now is None or state.samples_per_batch is None:
            return
        before = state.samples_per_batch * state.accumulation
        now = samples_now * self._accelerator.gradient_accumulation_steps
        if before != now:
            self._say(f"harness: warning: an optimizer step takes {now} samples from here on, and took {before}")

    def _say_what_is_one_sided(self, resumed: Resumed | None) -> None:
        if resumed is None:
            return
        self._say_what_is_frozen(resumed.state)
        saved = resumed.state.states
        for name in sorted(saved.keys() - self._registered.keys()):
            self._say(
                f"harness: warning: the checkpoint has a state of {name!r}, and nothing of that name is registered"
            )
        for name in sorted(self._registered.keys() - saved.keys()):
            self._say(f"harness: warning: {name!r} is not in the checkpoint: it starts from its initial state")

    def _say_what_is_frozen(self, state: TrainerState) -> None:
        """What was trained and is not any more: a loop may have unfrozen it in an epoch that is done."""
        if state.frozen is None or self._watched is None:
            return
        try:
            held = find_watched(self._accelerator, self._watched, weights_only=False, dtype=None)
        except CheckpointError:
            return  # of what the loop has changed since; the first save says it
        trained = {name for group in state.param_groups for name in group["params"]} - state.frozen
        if frozen := [name for name in held.frozen_names() if name in trained]:
            self._say(
                f"harness: warning: {some(frozen)}: requires_grad is False, and was True at the "
                "checkpoint; set it before the first batch, unless it is to be frozen from here on"
            )


def _savable_state(name: str, thing: Any) -> Any:
    """The state of a thing that is registered.

    Raises:
        CheckpointError: if its `state_dict` raises, or what it returns cannot be saved.
    """
    try:
        state = thing.state_dict()
    except Exception as error:
        raise CheckpointError(f"register({name!r}): state_dict() raised {type(error).__name__}: {error}") from error
    encode_state(name, state, None)
    return state
