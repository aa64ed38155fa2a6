"""How a published model is built again.

In reading order:

    model_spec       how the models of a run are built, as JSON
    trusted_classes  the classes that a description may name
    annotations      what a signature's annotations say, as types that values are checked against
    described_model  from a description to an object
    mlflow_flavor    `harness.load_model`, and MLflow's ``python_function``
"""
