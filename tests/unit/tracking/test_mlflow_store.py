from __future__ import annotations

import json
import math

from google.protobuf.json_format import ParseDict
from hypothesis import given
from hypothesis import strategies as st
from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.protos.service_pb2 import LogBatch

from harness.tracking.mlflow_client import server_of
from harness.tracking.mlflow_store import _log_batch_body

points = st.tuples(st.text(min_size=1), st.floats(), st.integers(0, 2**62), st.integers(0, 2**62))


@given(st.lists(points, max_size=5))
def test_request_is_mlflows_own_when_points_are_sent(logged: list[tuple[str, float, int, int]]) -> None:
    ours = ParseDict(json.loads(_log_batch_body("run-1", logged)), LogBatch())
    theirs = LogBatch(run_id="run-1", metrics=[Metric(*point).to_proto() for point in logged])
    assert [math.isnan(m.value) for m in ours.metrics] == [math.isnan(m.value) for m in theirs.metrics]
    for metric in (*ours.metrics, *theirs.metrics):
        metric.value = 0.0 if math.isnan(metric.value) else metric.value
    assert ours == theirs


def test_mlflows_client_is_asked_when_there_is_no_plain_server() -> None:
    assert server_of(MlflowClient("http://127.0.0.1:9")) is not None
    assert server_of(object()) is None
