"""Rebuild a published model from its description and its weights.

In reading order:

    model_spec       class, arguments, signature and packages of a run's models, as JSON
    trusted_classes  the classes that a model spec may name
    annotations      a constructor's annotations, and values converted to them
    described_model  model spec -> object
    mlflow_flavor    `harness.load_model`, and MLflow's ``python_function``
"""
