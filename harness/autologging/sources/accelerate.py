"""Observe scripts with an `accelerate.Accelerator`, and list the functions without effect in a replay."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.optim.optimizer import register_optimizer_step_post_hook

from harness.autologging.replacements import Function, Replacement
from harness.autologging.training_registry import TrainingRegistry
from harness.distributed import strategies
from harness.distributed.broadcast import broadcast_weights
from harness.distributed.launch_identity import is_launcher_rank_zero
from harness.distributed.model_preparation import separate_embeddings
from harness.distributed.topology import strategy_of
from harness.io.redact import redact_named


class AccelerateSource:
    """Reports the calls of accelerate to the current training.

    Effects: the replacements are collective where the replaced functions are. A hook on all optimizers is registered
    between `install` and `remove`.
    """

    def __init__(self, registry: TrainingRegistry) -> None:
        self._registry = registry
        self._context = registry.context
        # Whether `prepare` runs, which calls the methods that prepare one object.
        self._is_preparing = False
        # Whether the first backward or optimizer step has shown if the training is observed.
        self._is_known = False
        self._step_hook: Any = None

    def table(self) -> list[Replacement]:
        """Return the replacements."""
        accelerator, loaders, join = (
            "accelerate.accelerator",
            "accelerate.data_loader",
            "torch.distributed.algorithms.join",
        )
        return [
            Replacement(accelerator, "Accelerator.__init__", "run FSDP and ZeRO on a CPU too", self._init),
            Replacement(accelerator, "Accelerator.prepare", "model, optimizer, scheduler, loaders", self._prepare),
            *(
                Replacement(accelerator, f"Accelerator.prepare_{kind}", "one of them", partial(self._prepare_one, kind))
                for kind in ("model", "optimizer", "scheduler", "data_loader")
            ),
            Replacement(accelerator, "Accelerator.backward", "the loss; the iteration trains", self._backward),
            Replacement(accelerator, "Accelerator.log", "the script's metrics", self._log),
            Replacement(accelerator, "Accelerator.init_trackers", "the script's parameters", self._init_trackers),
            Replacement(
                accelerator,
                "Accelerator.register_for_checkpointing",
                "the script's other state",
                self._register_objects,
            ),
            Replacement(accelerator, "Accelerator.end_training", "the training ends", self._end_training),
            Replacement(accelerator, "Accelerator.free_memory", "the training ends", self._free_memory),
            Replacement(accelerator, "Accelerator.save_state", "save each state once", self._save_state),
            *(
                Replacement(module, "destroy_process_group", "the training ends", self._destroy_process_group)
                for module in ("torch.distributed", "torch.distributed.distributed_c10d")
            ),
            Replacement(
                "accelerate.utils.memory", "should_reduce_batch_size", "an attempt fails", self._reduce_batch_size
            ),
            Replacement(loaders, "DataLoaderShard.__iter__", "iterations over the data", self._iterate),
            Replacement(loaders, "DataLoaderDispatcher.__iter__", "iterations over the data", self._iterate),
            Replacement("accelerate.tracking", "MLflowTracker.log", "log each value once", self._log_to_mlflow),
            Replacement(
                "accelerate.local_sgd", "LocalSGD.__enter__", "weights differ between ranks", self._enter_local_sgd
            ),
            Replacement(join, "Join.__enter__", "ranks have different numbers of batches", self._enter_join),
            Replacement(join, "Join.__exit__", "ranks have different numbers of batches", self._exit_join),
        ]

    def install(self) -> None:
        """Observe optimizer steps, for the message about a training that is not observed."""
        self._step_hook = register_optimizer_step_post_hook(self._optimizer_stepped)

    def remove(self) -> None:
        """Stop observing."""
        self._step_hook.remove()

    # ------------------------------------------------------------------------------ prepare

    def _init(self, original: Function, accelerator: Accelerator, *args: Any, **kwargs: Any) -> None:
        if not args:
            kwargs = strategies.with_cpu_strategies(kwargs)
        original(accelerator, *args, **kwargs)

    def _prepare(self, original: Function, accelerator: Accelerator, *args: Any, **kwargs: Any) -> Any:
        return self._prepared(accelerator, args, lambda: original(accelerator, *args, **kwargs))

    def _prepare_one(self, kind: str, original: Function, accelerator: Accelerator, *args: Any, **kwargs: Any) -> Any:
        given = args[0] if args else kwargs.get(kind)
        is_for_evaluation = kind == "model" and (args[2] if len(args) > 2 else kwargs.get("evaluation_mode", False))
        return self._prepared(
            accelerator, () if is_for_evaluation else (given,), lambda: original(accelerator, *args, **kwargs)
        )

    def _prepared(self, accelerator: Accelerator, given: tuple[Any, ...], prepare: Callable[[], Any]) -> Any:
        if self._is_preparing:
            return prepare()
        for each in given:
            if isinstance(each, torch.nn.Module):
                separate_embeddings(accelerator, each)
                if strategy_of(accelerator) == "fsdp1" and accelerator.device.type == "cpu":
                    broadcast_weights(each)
        self._is_preparing = True
        try:
            result = prepare()
        finally:
            self._is_preparing = False
        if given:
            self._registry.add_prepared(accelerator, given, result if len(given) > 1 else (result,))
        return result

    def _register_objects(self, original: Function, accelerator: Accelerator, *objects: Any) -> None:
        original(accelerator, *objects)
        if accelerator is self._registry.session.prepared.accelerator:
            self._registry.session.register_objects()

    # ------------------------------------------------------------------------------ the loop

    def _iterate(self, original: Function, loader: Any) -> Iterator[Any]:
        self._registry.iteration_begins()
        return self._registry.session.iterate(loader, original)

    def _backward(self, original: Function, accelerator: Accelerator, loss: Any, **kwargs: Any) -> None:
        self._is_known = True
        if self._registry.session.backward(accelerator, loss):
            original(accelerator, loss, **kwargs)

    def _optimizer_stepped(self, *_: Any) -> None:
        if self._is_known:
            return
        self._is_known = True
        has_callback = any(name.startswith("harness.integrations.") for name in sys.modules)
        if not has_callback and is_launcher_rank_zero():
            self._registry.session.messages.say_once(
                "an optimizer steps, and accelerator.backward was not called: this training is not observed, so "
                "nothing of it is logged or saved"
            )

    def _enter_local_sgd(self, original: Function, local_sgd: Any) -> Any:
        session = self._registry.session
        if local_sgd.enabled and not session.prepared.has_local_weights:
            session.prepared.has_local_weights = True
            if session.logger is not None:
                session.logger.unwatch()
            session.messages.say(
                "harness: autolog: under LocalSGD each rank has weights and optimizer state of its own: there are "
                "metrics and no checkpoints from here on"
            )
        return original(local_sgd)

    def _enter_join(self, original: Function, join: Any) -> Any:
        if join._enable:
            self._registry.session.prepared.join = join
        return original(join)

    def _exit_join(self, original: Function, join: Any, *error: Any) -> Any:
        try:
            return original(join, *error)
        finally:
            self._registry.session.prepared.join = None

    # ------------------------------------------------------------------------------ metrics and parameters

    def _log(
        self,
        original: Function,
        accelerator: Accelerator,
        values: Mapping[str, Any],
        step: int | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        session = self._registry.session
        if session.is_replaying:
            return
        # While the run is open, values go to MLflow once, and not also through a tracker.
        is_running = session.is_running
        with self._context.in_tracker(is_logged_already=is_running):
            # Redact text, which accelerate's trackers accept and store unchanged.
            original(accelerator, redact_named(values, only_text=True), step, *args, **kwargs)
        if is_running or self._context.settings.exclusive or not _tracks_in_mlflow(accelerator):
            self._registry.session.log(values, step)

    def _log_to_mlflow(self, original: Function, *args: Any, **kwargs: Any) -> None:
        # Skipping the call also avoids the tracker's message for each tensor that it drops.
        if self._context.settings.exclusive or not self._context.is_logged_already:
            original(*args, **kwargs)

    def _init_trackers(
        self,
        original: Function,
        accelerator: Accelerator,
        project_name: str,
        config: Mapping[str, Any] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        with self._context.in_tracker():
            redacted = redact_named(config) if isinstance(config, Mapping) else config
            original(accelerator, project_name, redacted, *args, **kwargs)
        # Otherwise accelerate's MLflow tracker has logged it to the run.
        if config is not None and (self._context.settings.exclusive or not _tracks_in_mlflow(accelerator)):
            self._registry.log_config(config)

    # ------------------------------------------------------------------------------ saved states

    def _save_state(
        self, original: Function, accelerator: Accelerator, output_dir: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Save a state, or return the path of one that was saved before the run was interrupted.

        accelerate numbers the states (`automatic_checkpoint_naming`) from 0 in each process. Our checkpoint has the
        number of a resumed run.
        """
        session, project = self._registry.session, accelerator.project_configuration
        state = session.state if session.prepared.accelerator is accelerator else None
        if state is None or state.num_states is None:
            return original(accelerator, output_dir, *args, **kwargs)
        is_numbered = project.automatic_checkpoint_naming
        if not session.is_past_replay:
            path = _numbered_state(accelerator) if is_numbered else Path(output_dir)
            if session.is_replaying or (is_numbered and project.iteration < state.num_states and path.exists()):
                project.iteration += 1
                return path
        else:
            project.iteration, state.num_states = max(project.iteration, state.num_states), None
        if is_numbered:
            # States saved after the checkpoint exist already, and accelerate does not overwrite them.
            while _numbered_state(accelerator).exists():
                project.iteration += 1
            accelerator.wait_for_everyone()  # others may still search as this rank creates it
        return original(accelerator, output_dir, *args, **kwargs)

    # ------------------------------------------------------------------------------ the end

    def _end_training(self, original: Function, accelerator: Accelerator, *args: Any, **kwargs: Any) -> Any:
        self._registry.end_training(accelerator, ends_tracker=True)
        return original(accelerator, *args, **kwargs)

    def _free_memory(self, original: Function, accelerator: Accelerator, *args: Any, **kwargs: Any) -> Any:
        self._registry.end_training(accelerator, ends_tracker=False)
        return original(accelerator, *args, **kwargs)

    def _destroy_process_group(self, original: Function, group: Any = None, *args: Any, **kwargs: Any) -> None:
        session = self._registry.session
        is_whole = group is None or group is torch.distributed.group.WORLD
        # With an exception in flight the script has failed, which is observed where the exception arrives.
        if is_whole and session.is_running and sys.exc_info()[0] is None:
            # The checkpoint of the last epoch may need the group.
            accelerator = session.prepared.accelerator
            assert accelerator is not None
            self._registry.end_training(accelerator, ends_tracker=False)
        original(group, *args, **kwargs)

    def _reduce_batch_size(self, original: Function, error: Exception) -> bool:
        has_failed = bool(original(error))
        if has_failed:
            self._registry.attempt_failed(error)
        return has_failed


def _tracks_in_mlflow(accelerator: Accelerator) -> bool:
    return any(tracker.name == "mlflow" for tracker in accelerator.trackers)


def _numbered_state(accelerator: Accelerator) -> Path:
    return Path(str(accelerator.project_dir), "checkpoints", f"checkpoint_{accelerator.save_iteration}")


def _do_nothing(original: Function, *args: Any, **kwargs: Any) -> None:
    """Replaces a function that would change or save state."""


REPLAY_TABLE = [
    Replacement(f"accelerate.{module}", name, "without effect in a replay", _do_nothing)
    for module, name in (
        # Gradients are not scaled, since backward has no effect.
        ("accelerator", "Accelerator.unscale_gradients"),
        ("accelerator", "Accelerator.save_model"),
        ("accelerator", "Accelerator.save"),
        ("optimizer", "AcceleratedOptimizer.step"),
        ("scheduler", "AcceleratedScheduler.step"),
    )
]
