"""How a test's server knows its users: by a token, as behind an identity provider, or as MLflow itself does."""

from __future__ import annotations

import os

from flask import Response, request
from mlflow.server.auth import authenticate_request_basic_auth
from werkzeug.datastructures import Authorization


def authenticate() -> Authorization | Response:
    """The user of a request, or the answer that asks for one."""
    found = request.authorization
    if found is not None and found.type == "bearer" and found.token == os.environ["HARNESS_TEST_TOKEN"]:
        return Authorization("basic", {"username": "admin"})
    return authenticate_request_basic_auth()
