"""The module that MLmodel files of harness name as their ``loader_module``, so it keeps its place.

MLflow imports it to load a published checkpoint as a ``python_function``; see `harness.models.mlflow_flavor`.
"""

from harness.models.mlflow_flavor import _load_pyfunc as _load_pyfunc
from harness.models.mlflow_flavor import load_model as load_model
