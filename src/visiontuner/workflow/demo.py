"""Serve a page on this machine to try a model on."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import uvicorn
from numpy.typing import NDArray

from visiontuner import interrupts
from visiontuner.data.arrays import FeatureSet
from visiontuner.data.dataset import ImageDataset, Sample
from visiontuner.demo.app import Answerer, TrainingImages, build_app
from visiontuner.demo.gradio_space import write_space
from visiontuner.errors import DataError, UserMistake, VisiontunerError
from visiontuner.experiment.schema import Experiment
from visiontuner.journal import newest_search, read_events
from visiontuner.model.classifier import FEATURES, Classifier
from visiontuner.model.novelty import balanced_sample
from visiontuner.paths import EXPERIMENT_FILE, JOURNAL_FILE
from visiontuner.search.plan import Stores
from visiontuner.serving.client import find_classifier
from visiontuner.workflow.answering import run_over_images
from visiontuner.workflow.inputs import Inputs, Observer, Silent
from visiontuner.workflow.promote import model_folder

HOST = "127.0.0.1"
PORT = 7860
# 5,000 x 1,280 features are 26 MB. Without the search's features the network computes some: ten
# seconds with EfficientNet-Lite0.
_COMPARED, _COMPUTED = 5_000, 600


def demo(
    model: str | None = None,
    *,
    port: int = PORT,
    observer: Observer | None = None,
    ready: Callable[[str], None] = lambda _: None,
) -> None:
    """Serve the page until it is interrupted.

    Args:
        model: as `workflow.query` takes it; default: the newest search's.
        port: on the loopback interface; 0 for any that is free.
        ready: called with the page's address once it answers.

    Raises:
        UserMistake: there is no such model, or the port is taken.
        ClassifierError: the model is damaged.
    """
    observer = observer or Silent()
    with _listening(port) as listener, model_folder(model or str(newest_search())) as folder:
        classifier = Classifier.load(find_classifier(folder))
        answerer = Answerer(classifier, training_images(classifier, observer))
        classifier.warm_up()
        app = build_app(answerer, title=title_of(classifier))
        config = uvicorn.Config(
            app, log_level="warning", lifespan="off", timeout_graceful_shutdown=3
        )
        server = uvicorn.Server(config)
        ready(f"http://{HOST}:{listener.getsockname()[1]}/")
        with suppress(KeyboardInterrupt):  # from Python; at the command line it is counted
            server.run(sockets=[listener])
        interrupts.take()  # Ctrl-C is how it ends


def export_demo(model: str | None, folder: Path) -> Path:
    """Write a Gradio Space of a model.

    Args:
        model: as of `demo`.
        folder: must not be there yet.

    Raises:
        UserMistake: there is no such model, or something is at that place.
        VisiontunerError: it cannot be written.
    """
    with model_folder(model or str(newest_search())) as found:
        classifier = Classifier.load(find_classifier(found))
        return write_space(classifier.folder, folder, title=title_of(classifier))


@contextmanager
def _listening(port: int) -> Iterator[socket.socket]:
    """The socket is there before anything is loaded: a port that is taken is said at once."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
        listener.listen()
    except (OSError, OverflowError) as error:
        listener.close()
        raise UserMistake(
            f"Cannot serve on port {port} ({getattr(error, 'strerror', None) or error}). "
            "Another one: --port 7861, or 0 for any that is free."
        ) from None
    with listener:
        yield listener


def title_of(classifier: Classifier) -> str:
    """The search's name, or the folder's."""
    search = _search_of(classifier)
    if search is None:
        return classifier.folder.resolve().name
    return str(Experiment.load(search / EXPERIMENT_FILE).name)


def _search_of(classifier: Classifier) -> Path | None:
    search = classifier.folder.resolve().parent
    return search if (search / JOURNAL_FILE).is_file() else None


def training_images(classifier: Classifier, observer: Observer) -> TrainingImages | None:
    """Those of the search that a classifier lies in; None where they cannot be had."""
    search = _search_of(classifier)
    if search is None or FEATURES not in classifier.output_names:
        return None
    try:
        dataset = Inputs(Experiment.load(search / EXPERIMENT_FILE), observer).dataset
    except VisiontunerError as error:
        observer.note(f"warning: no nearest training images: {error}")
        return None
    paths, labels, features = _cached(classifier, search) or _computed(
        classifier, dataset, observer
    )
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    return TrainingImages(
        root=dataset.root,
        paths=paths,
        names=[dataset.class_names[label] for label in labels],
        features=features / np.maximum(lengths, np.finfo(np.float32).tiny),
    )


_Compared = tuple[Sequence[str], NDArray[np.int64], NDArray[np.float32]]


def _cached(classifier: Classifier, search: Path) -> _Compared | None:
    """A head's features are those that the search has trained on, if they are still there."""
    backbone = (classifier.metadata.get("configuration") or {}).get("backbone")
    store = Stores.of(read_events(search).events, backbone).features
    if classifier.metadata.get("train") != "head" or store is None:
        return None
    try:
        split = FeatureSet.open(store).split("train")
    except DataError:
        return None
    rows = balanced_sample(split.labels, _COMPARED)
    return [split.paths[row] for row in rows], split.labels[rows], np.array(split.features[rows])


def _computed(classifier: Classifier, dataset: ImageDataset, observer: Observer) -> _Compared:
    train = dataset.splits["train"]
    labels = np.array([sample.label for sample in train], dtype=np.int64)
    chosen = [train[row] for row in balanced_sample(labels, _COMPUTED)]
    good: list[Sample] = []
    rows: list[NDArray[np.float32]] = []
    for batch in run_over_images(
        classifier,
        dataset.root,
        chosen,
        [FEATURES],
        progress=lambda done, total: observer.progress("Comparing", done, total, "images"),
    ):
        good += batch.samples
        rows += batch.outputs
    labels = np.array([sample.label for sample in good], dtype=np.int64)
    return [sample.path for sample in good], labels, np.concatenate(rows)
