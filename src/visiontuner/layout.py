"""What lies where, by name; a search folder's parts have the same names in MLflow's artifacts."""

from __future__ import annotations

# Where the commands run:
SEARCHES_FOLDER = "searches"
RANGE_TESTS_FOLDER = "lr-find"
# In the folder of a range test:
RANGE_TEST_FILE = "range_test.json"
# In the cache folder:
CACHE_MARK_FILE = ".writable"
# In a search folder, beside its journal:
EXPERIMENT_FILE = "experiment.yaml"
MLFLOW_FILE = "mlflow.json"  # where in MLflow its runs are
CLASSIFIER_FOLDER = "classifier"
EVALUATION_FOLDER = "evaluation"
TEST_LOOKS_FILE = "test_looks.json"  # beside the evaluation, which may not get written after a look
# In the evaluation folder:
EVALUATION_REPORT = "report.json"
EVALUATION_PREDICTIONS = "predictions.npz"
EVALUATION_CLASSES = "classes.csv"
