"""What lies where in a search folder, by name; under the same names in MLflow's artifacts."""

from __future__ import annotations

EXPERIMENT_FILE = "experiment.yaml"
CLASSIFIER_FOLDER = "classifier"
EVALUATION_FOLDER = "evaluation"
TEST_LOOKS_FILE = "test_looks.json"  # beside the evaluation, which may not get written after a look
# In the evaluation folder:
EVALUATION_REPORT = "report.json"
EVALUATION_PREDICTIONS = "predictions.npz"
EVALUATION_CLASSES = "classes.csv"
