"""What lies where in a search folder, by name; under the same names in MLflow's artifacts."""

from __future__ import annotations

EXPERIMENT_FILE = "experiment.yaml"
CLASSIFIER_FOLDER = "classifier"
EVALUATION_FOLDER = "evaluation"
# In the evaluation folder:
EVALUATION_REPORT = "report.json"
EVALUATION_PREDICTIONS = "predictions.npz"
EVALUATION_CLASSES = "classes.csv"
