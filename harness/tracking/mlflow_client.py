"""Reaching MLflow: at which address, for how long, and which of its errors are for good."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_TIMEOUT, MLFLOW_TRACKING_URI
from mlflow.exceptions import MlflowException
from mlflow.store.db.db_types import DATABASE_ENGINES
from mlflow.store.tracking.rest_store import RestStore
from urllib3.exceptions import ReadTimeoutError

DEFAULT_TRACKING_URI = "sqlite:///mlflow.db"
_SQLITE = "sqlite:///"

# A server that is too slow is given longer: a shorter wait for the same would end in the same way for ever.
LONGEST_TIMEOUT_S = 120

# A database that nobody answers at.
_CONNECT_S = 10

# Refusals that another try cannot mend.
_PERMANENT_CODES = frozenset(
    {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS", "INVALID_STATE", "FEATURE_DISABLED"}
)


def resolve_tracking_uri(configured: str | None) -> str:
    """The configured URI, else ``MLFLOW_TRACKING_URI``, else the embedded default."""
    return configured or MLFLOW_TRACKING_URI.get() or DEFAULT_TRACKING_URI


def connect(tracking_uri: str) -> mlflow.MlflowClient:
    """MLflow's own client of an address.

    Effects: not collective; any thread; blocks where it is a database that is reached directly.

    Raises:
        Exception: the database driver's own.
    """
    _require_database(tracking_uri)
    return mlflow.MlflowClient(tracking_uri)


def server_of(client: Any) -> Any:
    """What a client of MLflow's reaches a plain server by; None: it reaches something else, or is none of MLflow's."""
    store = getattr(getattr(client, "_tracking_client", None), "store", None)
    return store if type(store) is RestStore else None


def has_run(tracking_uri: str, run_id: str) -> bool:
    """Whether the store at an address has the run. One that cannot be asked now has not; nothing is made there."""
    if tracking_uri.startswith(_SQLITE) and not Path(tracking_uri.removeprefix(_SQLITE)).exists():
        return False
    try:
        connect(tracking_uri).get_run(run_id)
    except Exception:
        return False
    return True


def is_permanent(error: Exception) -> bool:
    """Whether the store has said no for good, as against being away or slow."""
    return isinstance(error, MlflowException) and error.error_code in _PERMANENT_CODES


def give_longer(error: Exception) -> None:
    """Wait longer from now on where a server did not answer in time, up to `LONGEST_TIMEOUT_S`.

    In the process's environment, where MLflow looks at each request.
    """
    if _is_timeout(error):
        now_s = MLFLOW_HTTP_REQUEST_TIMEOUT.get()
        MLFLOW_HTTP_REQUEST_TIMEOUT.set(max(now_s, min(2 * now_s, LONGEST_TIMEOUT_S)))


def _is_timeout(error: BaseException | None) -> bool:
    while error is not None:
        # Of the server's answer, as against that of the connection: one that is away is not slow.
        if isinstance(error, ReadTimeoutError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _require_database(tracking_uri: str) -> None:
    """Reach the database, where it is one that is written into directly, and see to it that it has its tables.

    MLflow itself tries for a minute and a half, whatever is wrong, before it says so. And its client makes the tables
    without the lock that its server takes: of the tasks of an array, which begin at once, all but one would fail
    (mlflow 3.17, seen with sqlite).

    Raises:
        Exception: the driver's own.
    """
    if "://" not in tracking_uri or tracking_uri.partition(":")[0].partition("+")[0] not in DATABASE_ENGINES:
        return
    from mlflow.store.db.utils import _safe_initialize_tables
    from sqlalchemy import create_engine, make_url
    from sqlalchemy.pool import NullPool

    url = make_url(tracking_uri)
    limits = {"connect_timeout": _CONNECT_S} if url.get_backend_name() in ("postgresql", "mysql") else {}
    engine = create_engine(url, poolclass=NullPool, connect_args=limits)
    engine.connect().close()
    _safe_initialize_tables(engine)
