"""Autologging on and off: the table of what is replaced, and the training that runs now."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch.optim.optimizer import register_optimizer_step_post_hook

from harness.autologging import exit_hooks
from harness.autologging.patches import mlflow as mlflow_patches
from harness.autologging.patches.joins import Joins
from harness.autologging.patches.other_ranks import OtherRanks
from harness.autologging.patches.saved_states import SavedStates
from harness.autologging.patches.summary_writers import SummaryWriters
from harness.autologging.replacements import Replacement, Replacements
from harness.autologging.script import Arguments
from harness.autologging.session import Session
from harness.autologging.settings import AutologSettings
from harness.autologging.training_registry import TrainingRegistry
from harness.distributed import cpu_strategies, strategies
from harness.distributed.fsdp2_layers import separate_embeddings
from harness.distributed.launch_identity import is_launcher_rank_zero
from harness.io.redact import redact_named
from harness.tracking.mlflow.given_run import GivenRun, active_run_id, given_run

Function = Callable[..., Any]


class Patcher:
    """The one that is on in this process: replaces functions, and leads what they are called with to a session.

    Effects: as `harness.autolog` says.

    Args:
        settings: what was asked for.
    """

    def __init__(self, settings: AutologSettings) -> None:
        self.settings = settings
        self._arguments = Arguments()
        self._ending = exit_hooks.ExitHooks(self.finish, self.fail)
        self._trainings = trainings = TrainingRegistry(
            settings,
            self._arguments,
            self._run_to_be_ours,
            mlflow_patches.end_active_run,
            lambda: Replacements(self._table_of_stillness()),
            self._ending.begins,
        )
        self._fluent = mlflow_patches.MlflowPatches(
            lambda: self.session, trainings.run_id_before, trainings.run_id_after
        )
        self._writers = SummaryWriters(lambda: self.session)
        others = OtherRanks(lambda: self.session)
        self._saved_states = SavedStates(lambda: self.session)
        joins = Joins(lambda: self.session)
        tables = (self._table(), self._writers.table(), others.table(), joins.table())
        self._replacements = Replacements([row for table in tables for row in table])
        # Within `prepare`, which calls for each thing what prepares it alone.
        self._is_preparing = False
        # Whether what an optimizer's step tells of is known: that its training is seen, or that it is not.
        self._is_known = False
        self._step_hook: Any = None

    @property
    def session(self) -> Session:
        """The training that runs, or is to begin."""
        return self._trainings.session

    def _table(self) -> list[Replacement]:
        of_accelerate, of_loaders, calls = "accelerate.accelerator", "accelerate.data_loader", self._fluent
        return [
            Replacement(of_accelerate, "Accelerator.__init__", "FSDP and ZeRO run on a CPU too", self._made),
            Replacement(of_accelerate, "Accelerator.prepare", "model, optimizer, scheduler, loaders", self._prepared),
            *(
                Replacement(
                    of_accelerate, f"Accelerator.prepare_{name}", "each alone", partial(self._prepared_alone, name)
                )
                for name in ("model", "optimizer", "scheduler", "data_loader")
            ),
            Replacement(of_accelerate, "Accelerator.backward", "the loss; that this is training", self._backward),
            Replacement(of_accelerate, "Accelerator.log", "the script's metrics", self._log),
            Replacement(of_accelerate, "Accelerator.init_trackers", "the script's parameters", self._init_trackers),
            Replacement(of_accelerate, "Accelerator.register_for_checkpointing", "what else goes on", self._registered),
            Replacement(of_accelerate, "Accelerator.end_training", "the training has ended", self._ends),
            Replacement(of_accelerate, "Accelerator.free_memory", "the training has ended", self._frees),
            Replacement(of_accelerate, "Accelerator.save_state", "once each", self._saved_states.save),
            *(
                Replacement(module, "destroy_process_group", "the training has ended", self._destroys)
                for module in ("torch.distributed", "torch.distributed.distributed_c10d")
            ),
            Replacement("accelerate.utils.memory", "should_reduce_batch_size", "an attempt fails", self._reduces),
            Replacement(of_loaders, "DataLoaderShard.__iter__", "passes over the data", self._iterate),
            Replacement(of_loaders, "DataLoaderDispatcher.__iter__", "passes over the data", self._iterate),
            Replacement("accelerate.tracking", "MLflowTracker.log", "once", self._tracked),
            Replacement("accelerate.local_sgd", "LocalSGD.__enter__", "ranks train apart", self._apart),
            Replacement("argparse", "ArgumentParser.parse_known_args", "the script's arguments", self._parsed),
            Replacement("mlflow", "start_run", "the script's run and ours are one", calls.start_run),
            Replacement("mlflow", "log_metric", "the script's metrics", calls.log_metric),
            Replacement("mlflow", "log_metrics", "the script's metrics", calls.log_metrics),
            Replacement("mlflow", "log_param", "the script's parameters", calls.log_param),
            Replacement("mlflow", "log_params", "the script's parameters", calls.log_params),
        ]

    def _table_of_stillness(self) -> list[Replacement]:
        """What does nothing while epochs go by that are done."""
        return [
            Replacement(f"accelerate.{module}", name, "of an epoch that is done", _do_nothing)
            for module, name in (
                # Of gradients that nobody has scaled.
                ("accelerator", "Accelerator.unscale_gradients"),
                ("accelerator", "Accelerator.save_model"),
                ("accelerator", "Accelerator.save"),
                ("optimizer", "AcceleratedOptimizer.step"),
                ("scheduler", "AcceleratedScheduler.step"),
            )
        ]

    def turn_on(self) -> None:
        """Replace, and watch for the script's end."""
        self._replacements.put()
        self._step_hook = register_optimizer_step_post_hook(self._optimizer_stepped)
        self._ending.watch()

    def turn_off(self) -> None:
        """Put everything back; a training that runs ends here, as far as it is logged."""
        self._replacements.take_away()
        self._step_hook.remove()
        self._ending.leave()
        self.finish()

    def forked(self) -> None:
        """This process is a child of the one before."""
        self._trainings.forked()

    def change(self, settings: AutologSettings) -> None:
        """Other settings, for a training that has not begun."""
        self.settings = settings
        self._trainings.change(settings)

    # ------------------------------------------------------------------- in place of accelerate's

    def _made(self, original: Function, accelerator: Accelerator, *args: Any, **kwargs: Any) -> None:
        if not args:
            kwargs = strategies.with_cpu_strategies(kwargs)
        original(accelerator, *args, **kwargs)

    def _prepared(self, original: Function, accelerator: Accelerator, *args: Any, **kwargs: Any) -> Any:
        return self._prepare(accelerator, args, lambda: original(accelerator, *args, **kwargs))

    def _prepared_alone(
        self, name: str, original: Function, accelerator: Accelerator, *args: Any, **kwargs: Any
    ) -> Any:
        given = args[0] if args else kwargs.get(name)
        is_for_evaluation = name == "model" and (args[2] if len(args) > 2 else kwargs.get("evaluation_mode", False))
        return self._prepare(
            accelerator, () if is_for_evaluation else (given,), lambda: original(accelerator, *args, **kwargs)
        )

    def _prepare(self, accelerator: Accelerator, given: tuple[Any, ...], prepare: Callable[[], Any]) -> Any:
        if self._is_preparing:
            return prepare()
        for each in given:
            if isinstance(each, torch.nn.Module):
                separate_embeddings(accelerator, each)
                if strategies.strategy_of(accelerator) == "fsdp1" and accelerator.device.type == "cpu":
                    cpu_strategies.send_weights(each)
        self._is_preparing = True
        try:
            result = prepare()
        finally:
            self._is_preparing = False
        if given:
            self._trainings.came(accelerator, given, result if len(given) > 1 else (result,))
        return result

    def _backward(self, original: Function, accelerator: Accelerator, loss: Any, **kwargs: Any) -> None:
        self._is_known = True
        if self.session.backward(accelerator, loss):
            original(accelerator, loss, **kwargs)

    def _optimizer_stepped(self, *_: Any) -> None:
        """The first step of any optimizer: a script whose training is not seen says so then, and not at its end."""
        if self._is_known:
            return
        self._is_known = True
        has_callback = any(name.startswith("harness.integrations.") for name in sys.modules)
        if not has_callback and is_launcher_rank_zero():
            self.session.notes.say_once(
                "an optimizer steps, and accelerator.backward was not called: this training is not seen, so nothing of "
                "it is logged or saved"
            )

    def _log(
        self,
        original: Function,
        accelerator: Accelerator,
        values: Mapping[str, Any],
        step: int | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        if self.session.is_replaying:
            return
        # A tracker would hand the same values to MLflow: they are in the run already.
        is_taken = self.session.has_begun and not self.session.is_over
        self._fluent.is_within, self._writers.is_within = is_taken, True
        try:
            # Trackers of accelerate's get texts too, and keep them as they are.
            original(accelerator, redact_named(values, only_text=True), step, *args, **kwargs)
        finally:
            self._fluent.is_within = self._writers.is_within = False
        if is_taken or self.settings.exclusive or not _tracks_in_mlflow(accelerator):
            self.session.log(values, step)

    def _tracked(self, original: Function, *args: Any, **kwargs: Any) -> None:
        # It would say of each tensor that it has dropped it, too.
        if self.settings.exclusive or not self._fluent.is_within:
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
        self._writers.is_within = True
        try:
            redacted = redact_named(config) if isinstance(config, Mapping) else config
            original(accelerator, project_name, redacted, *args, **kwargs)
        finally:
            self._writers.is_within = False
        # accelerate's own tracker has put it into the run.
        if config is not None and (self.settings.exclusive or not _tracks_in_mlflow(accelerator)):
            self._trainings.log_config(config)

    def _registered(self, original: Function, accelerator: Accelerator, *objects: Any) -> None:
        original(accelerator, *objects)
        if accelerator is self.session.prepared.accelerator:
            self.session.register_objects()

    def _ends(self, original: Function, accelerator: Accelerator, *args: Any, **kwargs: Any) -> Any:
        self._trainings.ends(accelerator, is_tracker_done=True)
        return original(accelerator, *args, **kwargs)

    def _frees(self, original: Function, accelerator: Accelerator, *args: Any, **kwargs: Any) -> Any:
        self._trainings.ends(accelerator, is_tracker_done=False)
        return original(accelerator, *args, **kwargs)

    def _destroys(self, original: Function, group: Any = None, *args: Any, **kwargs: Any) -> None:
        session = self.session
        is_whole = group is None or group is torch.distributed.group.WORLD
        # In a `finally` behind an error the script has failed, which is seen where the error arrives.
        if is_whole and session.has_begun and not session.is_over and sys.exc_info()[0] is None:
            # The last epoch's checkpoint may need the group.
            self._trainings.ends(session.prepared.accelerator, is_tracker_done=False)
        original(group, *args, **kwargs)

    def _reduces(self, original: Function, error: Exception) -> bool:
        is_attempt_over = bool(original(error))
        if is_attempt_over:
            self._trainings.attempt_failed(error)
        return is_attempt_over

    def _apart(self, original: Function, local_sgd: Any) -> Any:
        session = self.session
        if local_sgd.enabled and not session.prepared.is_apart:
            session.prepared.is_apart = True
            if session.logger is not None:
                session.logger.unwatch()
            session.notes.say(
                "harness: autolog: under LocalSGD each rank has weights and an optimizer's state of its own, and a "
                "checkpoint would be of none: there are none from here on, metrics alone"
            )
        return original(local_sgd)

    def _iterate(self, original: Function, loader: Any) -> Iterator[Any]:
        self._trainings.passes()
        return self.session.iterate(loader, original)

    def _parsed(
        self,
        original: Function,
        parser: argparse.ArgumentParser,
        args: Sequence[str] | None = None,
        *others: Any,
        **kwargs: Any,
    ) -> tuple[argparse.Namespace, list[str]]:
        found: tuple[argparse.Namespace, list[str]] = original(parser, args, *others, **kwargs)
        self._arguments.parsed(args, found[0])
        return found

    def finish(self) -> None:
        """The training has ended; see `TrainingRegistry.finish`."""
        self._trainings.finish()

    def fail(self, error: BaseException) -> BaseException:
        """The script has failed; returns what really ended it."""
        return self._trainings.fail(error)

    def _run_to_be_ours(self) -> GivenRun | None:
        if self.settings.exclusive:
            return None
        self._fluent.saw_active(active_run_id())
        return given_run(self.settings.tracking.tracking_uri)


def _tracks_in_mlflow(accelerator: Accelerator) -> bool:
    return any(tracker.name == "mlflow" for tracker in accelerator.trackers)


def _do_nothing(original: Function, *args: Any, **kwargs: Any) -> None:
    """In place of what would change or save something."""


_on: Patcher | None = None


def turn_on(settings: AutologSettings) -> None:
    """Begin autologging, or change what a training is logged with that has not begun."""
    global _on
    if _on is None:
        _on = Patcher(settings)
        _on.turn_on()
    else:
        _on.change(settings)


def turn_off() -> None:
    """End autologging, where it is on."""
    global _on
    turned_off, _on = _on, None
    if turned_off is not None:
        turned_off.turn_off()


def change(settings: AutologSettings) -> None:
    """Change what a training is logged with that has not begun, where autologging is on."""
    if _on is not None:
        _on.change(settings)


def _forked() -> None:
    if _on is not None:
        _on.forked()


os.register_at_fork(after_in_child=_forked)


def script_ended(error: BaseException | None) -> BaseException | None:
    """The script has ended, by itself or by an error; returns what really ended it. For `harness run`.

    Raises:
        HarnessError: if the last checkpoint could not be written.
    """
    if _on is None:
        return error
    if error is not None:
        return _on.fail(error)
    _on.finish()
    return None
