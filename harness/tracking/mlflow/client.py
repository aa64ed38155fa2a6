"""Reaching MLflow: at which address, for how long, which answers are its own, and which of its errors are for good."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

import mlflow
import requests
from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_TIMEOUT, MLFLOW_TRACKING_URI
from mlflow.exceptions import MlflowException, RestException
from mlflow.store.db.db_types import DATABASE_ENGINES
from mlflow.store.tracking.rest_store import RestStore
from mlflow.utils import rest_utils
from urllib3.exceptions import ReadTimeoutError

DEFAULT_TRACKING_URI = "sqlite:///mlflow.db"
_SQLITE = "sqlite:///"

# A server that is too slow is given longer: a shorter wait for the same would end in the same way for ever.
LONGEST_TIMEOUT_S = 120

# A database that nobody answers at.
_CONNECT_S = 10

# Refusals that another try cannot mend. BAD_REQUEST is looked at on its own, see `is_permanent`.
_PERMANENT_CODES = frozenset(
    {"INVALID_PARAMETER_VALUE", "RESOURCE_ALREADY_EXISTS", "INVALID_STATE", "FEATURE_DISABLED"}
)
# SQLAlchemy ends its messages with a link that has the class of the error: these are DataError and IntegrityError.
# All others (QueuePool limit reached, a lost connection, a read-only replica) pass.
_SQL_ERROR = re.compile(r"sqlalche\.me/e/\w+/(\w+)")
_SQL_REFUSALS = frozenset({"9h9h", "gkpj"})
_CONFLICT = re.compile(r"UNIQUE constraint|duplicate key|Duplicate entry|duplicate value", re.IGNORECASE)
_MAX_CONFLICTS = 3
# Of a run or an experiment that somebody has deleted, and may restore: MLflow has no error code of its own for it, and
# the texts of its SQL store and of its file store differ.
_DELETED = re.compile(r"must be in (the )?'active' |under non-active experiment")

_Result = TypeVar("_Result")


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
    if tracking_uri.startswith(_SQLITE) and not Path(unquote(_path_of(tracking_uri))).exists():
        return False
    try:
        connect(tracking_uri).get_run(run_id)
    except Exception:
        return False
    return True


def _path_of(tracking_uri: str) -> str:
    return tracking_uri.removeprefix(_SQLITE).partition("?")[0]


def is_permanent(error: Exception) -> bool:
    """Whether MLflow has refused something for good, as against being away, slow or busy.

    Only MLflow's own JSON answers and its client's own checks count: a proxy's page with status 400 does not. An MLflow
    server answers BAD_REQUEST for nearly every error of its database, most of which pass. A run or an experiment that
    was deleted can be restored, so what it refuses meanwhile is not refused for good.
    """
    if not isinstance(error, MlflowException) or _DELETED.search(str(error)):
        return False
    if error.error_code == "BAD_REQUEST":
        is_own = isinstance(error, RestException) or error.__cause__ is not None
        return is_own and _SQL_REFUSALS.issuperset(_SQL_ERROR.findall(str(error)))
    return error.error_code in _PERMANENT_CODES


def despite_conflicts(action: Callable[[], _Result]) -> _Result:
    """Return what `action` returns, called again where the database says that a row is there already.

    Two requests that do the same at the same time, as after a repeated one, both look before they insert. The one
    that comes second finds the row when it looks again. `action` must look first, as MLflow's logging does.

    Raises:
        Exception: the store's own; the conflict, where it is there at the last of `_MAX_CONFLICTS` calls too.
    """
    for _ in range(_MAX_CONFLICTS - 1):
        try:
            return action()
        except MlflowException as error:
            if not _CONFLICT.search(str(error)):
                raise
    return action()


def require_json_answers() -> None:
    """Make MLflow's clients in this process raise an error where a success has no JSON object in its body.

    MLflow takes an empty body for `{}`, and looks at no body of an upload. A proxy or a login page answers so, and the
    server has received nothing. `rest_utils` has no hook for it: its one function that sends requests is wrapped.
    A server answers an upload with an empty body too: whether a file is there is seen by listing it.

    Effects: process-wide; not for a trainer's process. A second call does nothing.
    """
    send = rest_utils._get_http_response_with_retries  # type: ignore[attr-defined]
    if hasattr(send, "__wrapped__"):
        return

    @wraps(send)
    def checked(method: str, url: str, *args: Any, **kwargs: Any) -> requests.Response:
        response: requests.Response = send(method, url, *args, **kwargs)
        is_download = method == "GET" and kwargs.get("stream", False)
        if response.ok and "/api/" in urlsplit(url).path and not is_download:
            is_upload = method == "PUT" and not response.content
            if not is_upload and not _is_json_object(response.text):
                raise requests.exceptions.InvalidJSONError(
                    f"status {response.status_code} without a JSON object, which is not MLflow's answer: "
                    f"{response.text[:100]!r}",
                    response=response,
                )
        return response

    rest_utils._get_http_response_with_retries = checked  # type: ignore[attr-defined]


def _is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


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
    # MLflow leaves its lock. Who waits for it still finds the tables, and so does who makes another.
    name = hashlib.md5(str(engine.url).encode(), usedforsecurity=False).hexdigest()
    with suppress(OSError):
        Path(tempfile.gettempdir(), f"db_init_lock-{name}").unlink()
