"""Create versions of a registered model and set their aliases. Does not import mlflow.

The aliases depend only on the versions and their tags, so they can be recomputed after a crash.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.config.schema import Mode
from harness.tracking.mlflow.names import quoted

CHECKPOINT_TAG = "harness.checkpoint"
LAST, BEST = "last", "best"
_MONITOR_TAG, _MODE_TAG, _VALUE_TAG = "harness.monitor", "harness.monitor_mode", "harness.monitor_value"
# Other runs' publishers may register versions concurrently, so the aliases are checked again after each change.
_MAX_CHECKS = 5


@dataclass(frozen=True)
class Registration:
    """The registered model that gets a version for each published checkpoint.

    Args:
        aliases: whether to keep `last` on the newest version and `best` on the best one.
        monitor: the metric that defines `best`; None for no `best`.
        mode: whether the lowest or the highest value is the best.
    """

    name: str
    aliases: bool = False
    monitor: str | None = None
    mode: Mode = "min"


class Registry:
    """Creates and finds versions in the registered models of one MLflow store.

    Effects: not collective; one of the publisher's threads; each method is idempotent and blocks on the network.
    """

    def __init__(self, client: Any) -> None:
        self._client = client

    def register(self, registration: Registration, model_id: str, run_id: str, record: Mapping[str, Any]) -> None:
        """Create a version of the model, unless it exists, and update the aliases."""
        name = registration.name
        try:
            self._client.create_registered_model(name)
        except Exception as error:
            if getattr(error, "error_code", None) != "RESOURCE_ALREADY_EXISTS":
                raise
        # Compare the source, because MLflow 3.17 returns versions whose `model_id` is None.
        source = f"models:/{model_id}"
        if not any(version.source == source for version in self._versions_named(name)):
            tags = _tags(registration, record)
            self._client.create_model_version(name, source, run_id=run_id, tags=tags, model_id=model_id)
        self.update_aliases(registration)

    def update_aliases(self, registration: Registration, excluded: Collection[str] = ()) -> None:
        """Set `last` to the newest version that harness created and `best` to the best one, over all runs.

        `best` compares versions with the same metric and mode, newest first. `excluded` versions will be deleted.
        """
        if not registration.aliases:
            return
        name = registration.name
        for _ in range(_MAX_CHECKS):
            versions = [each for each in self._versions_named(name) if each.version not in excluded]
            wanted = _wanted(registration, versions)
            current = self._client.get_registered_model(name).aliases if wanted else {}
            moves = {alias: version for alias, version in wanted.items() if str(current.get(alias)) != version}
            if not moves:
                return
            for alias, version in moves.items():
                self._client.set_registered_model_alias(name, alias, version)

    def versions_of_model(self, model_id: str, run_id: str) -> Sequence[Any]:
        """Return the versions of any registered model whose source is the model's id or its files."""
        # A search by `source_path` would find only one of the two.
        found = self._versions(f"run_id = '{run_id}'")
        # Get each version, because a search omits the aliases.
        return [
            self._client.get_model_version(each.name, each.version) for each in found if model_id in (each.source or "")
        ]

    def _versions_named(self, name: str) -> Iterator[Any]:
        return self._versions(f"name = {quoted(name)}")

    def _versions(self, filter_string: str) -> Iterator[Any]:
        token = None
        while True:
            page = self._client.search_model_versions(filter_string, page_token=token)
            yield from page
            if not (token := page.token):
                return


def is_in_use(version: Any, registration: Registration | None) -> bool:
    """Whether a version must be kept: it is in another registered model, or has a stage or a user's alias."""
    if registration is None or version.name != registration.name:
        return True
    ours = {LAST, BEST} if registration.aliases else set()
    return bool(set(version.aliases) - ours) or version.current_stage not in (None, "", "None")


def _tags(registration: Registration, record: Mapping[str, Any]) -> dict[str, str]:
    tags = {CHECKPOINT_TAG: record["key"], "epoch": str(record["epoch"]), "step": str(record["step"])}
    value = record.get("monitored")
    if registration.monitor is not None and value is not None:
        # `repr` of a float is exact.
        tags |= {_MONITOR_TAG: registration.monitor, _MODE_TAG: registration.mode, _VALUE_TAG: repr(float(value))}
    return tags


def _wanted(registration: Registration, versions: Sequence[Any]) -> dict[str, str]:
    """Return alias -> version."""
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
