"""Connect to MLflow, with time limits and request limits, and classify its errors as permanent or transient."""

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

LONGEST_TIMEOUT_S = 120
_CONNECT_S = 10

# MLflow's limits on one request and on one value.
MAX_METRICS_PER_BATCH = 1000
MAX_PARAMS_PER_BATCH = 100
MAX_TAGS_PER_BATCH = 100
MAX_PARAM_CHARS = 6000
MAX_TAG_CHARS = 8000
MAX_DATASET_NAME_CHARS = 500

# `is_permanent` treats BAD_REQUEST separately.
_PERMANENT_CODES = frozenset(
    {"INVALID_PARAMETER_VALUE", "RESOURCE_ALREADY_EXISTS", "INVALID_STATE", "FEATURE_DISABLED"}
)
# SQLAlchemy's messages end with a link that names the error's class. These two are DataError and IntegrityError. The
# other classes (QueuePool limit reached, lost connection, read-only replica) are transient.
_SQL_ERROR = re.compile(r"sqlalche\.me/e/\w+/(\w+)")
_SQL_REFUSALS = frozenset({"9h9h", "gkpj"})
_CONFLICT = re.compile(r"UNIQUE constraint|duplicate key|Duplicate entry|duplicate value", re.IGNORECASE)
_MAX_CONFLICTS = 3
# Messages of MLflow's SQL store and file store about a deleted run or experiment, which have no error code.
_DELETED = re.compile(r"must be in (the )?'active' |under non-active experiment")

_Result = TypeVar("_Result")


def resolve_tracking_uri(configured: str | None) -> str:
    """Return the configured URI, else ``MLFLOW_TRACKING_URI``, else the embedded default."""
    return configured or MLFLOW_TRACKING_URI.get() or DEFAULT_TRACKING_URI


def connect(tracking_uri: str) -> mlflow.MlflowClient:
    """Create an MLflow client, and the tables of a database.

    Effects: not collective; any thread; blocks if the address is a database.

    Raises:
        Exception: the database driver's error.
    """
    _require_database(tracking_uri)
    return mlflow.MlflowClient(tracking_uri)


def rest_store_of(client: Any) -> Any:
    """Return the REST store of an MLflow client; None if the client uses a database or is not MLflow's own."""
    store = getattr(getattr(client, "_tracking_client", None), "store", None)
    return store if type(store) is RestStore else None


def has_run(tracking_uri: str, run_id: str) -> bool:
    """Whether the store at an address has the run; False if it is unreachable. Never creates an sqlite file."""
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
    """Whether MLflow has refused a request permanently, rather than being unreachable, slow or busy.

    Only MLflow's JSON responses and its client's checks count, not a proxy's page with status 400. An MLflow server
    responds BAD_REQUEST to most database errors, including transient ones. Errors about a deleted run or experiment are
    transient, because it can be restored.
    """
    if not isinstance(error, MlflowException) or _DELETED.search(str(error)):
        return False
    if error.error_code == "BAD_REQUEST":
        is_own = isinstance(error, RestException) or error.__cause__ is not None
        return is_own and _SQL_REFUSALS.issuperset(_SQL_ERROR.findall(str(error)))
    return error.error_code in _PERMANENT_CODES


def retry_conflicts(action: Callable[[], _Result]) -> _Result:
    """Call `action`, and repeat it if the database reports a duplicate row.

    Two concurrent identical requests, for example after a retry, may both insert a row. `action` must check for the row
    before it inserts, as MLflow's logging functions do, so that a repeated call finds it.

    Raises:
        Exception: the store's error, including a conflict in the last of `_MAX_CONFLICTS` calls.
    """
    for _ in range(_MAX_CONFLICTS - 1):
        try:
            return action()
        except MlflowException as error:
            if not _CONFLICT.search(str(error)):
                raise
    return action()


def require_json_responses() -> None:
    """Make MLflow's clients in this process raise an error if a successful response has no JSON object in its body.

    MLflow reads an empty body as `{}` and ignores the body of an upload's response, so it would accept the page of a
    proxy. `rest_utils` has no hook, so its function that sends requests is wrapped. Servers respond to uploads with an
    empty body, so uploads are verified by listing the files.

    Effects: process-wide; only for the publisher's process. A second call does nothing.
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


def extend_timeout(error: Exception) -> None:
    """Double the request timeout, up to `LONGEST_TIMEOUT_S`, if the error is a timeout of the server's response.

    Effects: sets the process's environment, which MLflow reads before each request.
    """
    if _is_timeout(error):
        now_s = MLFLOW_HTTP_REQUEST_TIMEOUT.get()
        MLFLOW_HTTP_REQUEST_TIMEOUT.set(max(now_s, min(2 * now_s, LONGEST_TIMEOUT_S)))


def _is_timeout(error: BaseException | None) -> bool:
    while error is not None:
        # A connect timeout means an unreachable server, not a slow one.
        if isinstance(error, ReadTimeoutError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _require_database(tracking_uri: str) -> None:
    """Connect to the database, if the address is one, and create its tables.

    MLflow retries for 90 s before it reports a connection error. Its client also creates the tables without the lock
    that its server acquires, so all but one of the tasks of a SLURM array would fail (mlflow 3.17 with sqlite).
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
    # MLflow does not remove its lock file. Removing it is safe, because every process checks for the tables.
    name = hashlib.md5(str(engine.url).encode(), usedforsecurity=False).hexdigest()
    with suppress(OSError):
        Path(tempfile.gettempdir(), f"db_init_lock-{name}").unlink()
