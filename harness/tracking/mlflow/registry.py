"""Versions of a registered model, and the aliases that we keep on them. MLflow's client comes in by the constructor.

What an alias belongs on follows from the versions and their tags alone, so that it can be worked out again after a
crash at any moment, and comes out the same.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.config.schema import Mode
from harness.tracking.mlflow.names import in_quotes

CHECKPOINT_TAG = "harness.checkpoint"
LAST, BEST = "last", "best"
_MONITOR_TAG, _MODE_TAG, _VALUE_TAG = "harness.monitor", "harness.monitor_mode", "harness.monitor_value"
# Another run's publisher may register in the same moment: looked at again until it is as it should be.
_MAX_LOOKS = 5


@dataclass(frozen=True)
class Registration:
    """Where published checkpoints are registered.

    Args:
        name: of the registered model.
        aliases: keep `last` on its newest version, and `best` on its best.
        monitor: the metric that `best` goes by; None: there is no `best`.
        mode: whether less of it is better, or more.
    """

    name: str
    aliases: bool = False
    monitor: str | None = None
    mode: Mode = "min"


class Registry:
    """The registered models of one MLflow store.

    Effects: not collective; the publisher's thread; each method blocks on the network, and can be called again with
    the same arguments.

    Args:
        client: an ``mlflow.MlflowClient``.
    """

    def __init__(self, client: Any) -> None:
        self._client = client

    def register(self, registration: Registration, model_id: str, run_id: str, record: Mapping[str, Any]) -> None:
        """Have a version of the model, once, and the aliases where they belong."""
        name = registration.name
        try:
            self._client.create_registered_model(name)
        except Exception as error:
            if getattr(error, "error_code", None) != "RESOURCE_ALREADY_EXISTS":
                raise
        # `model_id` of a version that was found is None (MLflow 3.17), its source is not.
        source = f"models:/{model_id}"
        if not any(version.source == source for version in self._versions_of(name)):
            tags = _tags(registration, record)
            self._client.create_model_version(name, source, run_id=run_id, tags=tags, model_id=model_id)
        self.place_aliases(registration)

    def place_aliases(self, registration: Registration, leaving: Collection[str] = ()) -> None:
        """Have `last` on the newest version of ours, and `best` on the best, whichever run it is of.

        Compared are versions that carry a value of the same metric under the same mode; of two that are as good the
        newer is the better. Versions in `leaving` are about to be deleted.
        """
        if not registration.aliases:
            return
        name = registration.name
        for _ in range(_MAX_LOOKS):
            versions = [each for each in self._versions_of(name) if each.version not in leaving]
            wanted = _wanted(registration, versions)
            have = self._client.get_registered_model(name).aliases if wanted else {}
            moves = {alias: version for alias, version in wanted.items() if str(have.get(alias)) != version}
            if not moves:
                return
            for alias, version in moves.items():
                self._client.set_registered_model_alias(name, alias, version)

    def of_model(self, model_id: str, run_id: str) -> Sequence[Any]:
        """Versions in any registered model that lead to the model: by its id, or by where its files are."""
        # `source_path` would find one of the two only.
        found = self._versions(f"run_id = '{run_id}'")
        # With the aliases, which a search leaves out.
        return [
            self._client.get_model_version(each.name, each.version) for each in found if model_id in (each.source or "")
        ]

    def _versions_of(self, name: str) -> Iterator[Any]:
        return self._versions(f"name = {in_quotes(name)}")

    def _versions(self, filter_string: str) -> Iterator[Any]:
        token = None
        while True:
            page = self._client.search_model_versions(filter_string, page_token=token)
            yield from page
            if not (token := page.token):
                return


def is_in_use(version: Any, registration: Registration | None) -> bool:
    """Whether somebody relies on a version: one elsewhere, one with a stage, or with an alias that is not ours."""
    if registration is None or version.name != registration.name:
        return True
    ours = {LAST, BEST} if registration.aliases else set()
    return bool(set(version.aliases) - ours) or version.current_stage not in (None, "", "None")


def _tags(registration: Registration, record: Mapping[str, Any]) -> dict[str, str]:
    tags = {CHECKPOINT_TAG: record["key"], "epoch": str(record["epoch"]), "step": str(record["step"])}
    value = record.get("monitored")
    if registration.monitor is not None and value is not None:
        # `repr` of a float reads back as the same one.
        tags |= {_MONITOR_TAG: registration.monitor, _MODE_TAG: registration.mode, _VALUE_TAG: repr(float(value))}
    return tags


def _wanted(registration: Registration, versions: Sequence[Any]) -> dict[str, str]:
    """Alias -> version."""
    newest_first = sorted(
        (version for version in versions if CHECKPOINT_TAG in version.tags), key=lambda each: -int(each.version)
    )
    wanted = {LAST: str(newest_first[0].version)} if newest_first else {}
    sign = 1 if registration.mode == "min" else -1
    ranked = [
        (sign * float(version.tags[_VALUE_TAG]), version)
        for version in newest_first
        if version.tags.get(_MONITOR_TAG) == registration.monitor and version.tags.get(_MODE_TAG) == registration.mode
    ]
    if registration.monitor is not None and ranked:
        wanted[BEST] = str(min(ranked, key=lambda each: each[0])[1].version)
    return wanted
