"""Ask an endpoint, a server or a model what is on pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from visiontuner.errors import UserMistake
from visiontuner.layout import CLASSIFIER_FOLDER
from visiontuner.locations import tracking_uri

if TYPE_CHECKING:
    from visiontuner.serving.batching import PictureAnswer
    from visiontuner.serving.client import Transport

LOCAL_SERVER = "http://127.0.0.1:5000"
_ADVICE = "Check MLFLOW_TRACKING_URI, then try again."


def query(
    sources: Sequence[str],
    *,
    endpoint: str | None = None,
    url: str | None = None,
    model: str | None = None,
    region: str | None = None,
    assume_role: str | None = None,
    top_k: int = 5,
    threshold: float | None = None,
    workers: int = 4,
    request_bytes: int | None = None,
    progress: Callable[[str, int, int, str], None] = lambda *_: None,
) -> Iterator[PictureAnswer]:
    """Answers for pictures, in their order, as they come.

    Args:
        sources: files, folders, http(s) URLs, `-` for standard input.
        endpoint: a SageMaker endpoint's name; exactly one of `endpoint`, `url` and `model`.
        url: of a scoring server.
        model: a classifier, model or search folder, or a registered model; asked in this process.
        region: of the endpoint; the one that AWS's own settings name if None.
        assume_role: ARN of a role to ask the endpoint as.
        threshold: answers below it are not confident; the classifier's own if None.
        workers: requests under way at a time.
        request_bytes: the largest request; SageMaker's limit if None.

    Raises:
        UserMistake: an option breaks a rule, or there is no such model.
        ServingError: nothing answers.
    """
    from visiontuner.serving.answers import BadRequest, Options
    from visiontuner.serving.batching import ask_all
    from visiontuner.serving.client import REQUEST_BYTES
    from visiontuner.serving.pictures import find_pictures

    if [endpoint, url, model].count(None) != 2:
        raise UserMistake("Name an endpoint, a server's URL or a model: one of them.")
    try:
        options = Options.read({"top_k": top_k, "threshold": threshold, "on_error": "report"})
    except BadRequest as error:
        raise UserMistake(str(error)) from None
    pictures = find_pictures(sources)
    limit = request_bytes or REQUEST_BYTES
    with _way(endpoint, url, model, region, assume_role, limit) as transport:
        answers = ask_all(transport, pictures, options, workers=1 if model else workers)
        for done, answer in enumerate(answers, 1):
            progress("Asking", done, len(pictures), "pictures")
            yield answer


@contextmanager
def _way(
    endpoint: str | None,
    url: str | None,
    model: str | None,
    region: str | None,
    assume_role: str | None,
    limit: int,
) -> Iterator[Transport]:
    from visiontuner.aws import Aws
    from visiontuner.serving.client import HttpTransport, SageMakerTransport
    from visiontuner.serving.local import open_model

    if model is not None:
        with model_folder(model) as folder:
            yield open_model(folder)
    elif url is not None:
        yield HttpTransport(url, body_limit=limit)
    elif assume_role is not None:
        aws = Aws(region, assume_role)
        yield SageMakerTransport(
            endpoint or "", region=aws.region, body_limit=limit, session=aws.session
        )
    else:
        yield SageMakerTransport(endpoint or "", region=region, body_limit=limit)


@contextmanager
def model_folder(model: str) -> Iterator[Path]:
    """The folder that a text means: one that is there, or a registered model's, fetched for now.

    A name alone means the champion, or the newest version while there is none.

    Raises:
        UserMistake: there is no such model.
        TrackingError: MLflow is away or refuses.
    """
    folder = Path(model)
    if folder.is_dir():
        inside = folder / CLASSIFIER_FOLDER
        yield inside if inside.is_dir() else folder
        return
    uri = model_uri(model)
    from visiontuner.tracking.client import Store

    with TemporaryDirectory(prefix="visiontuner-") as temporary:
        yield Store(tracking_uri(), advice=_ADVICE).download(uri, Path(temporary))


def model_uri(model: str) -> str:
    """`models:/NAME/VERSION` of a registered model.

    Raises:
        UserMistake: there is no such model, version or alias.
        TrackingError: MLflow is away or refuses.
    """
    from visiontuner.serving.versions import CHAMPION, ModelReference, aliases, find_version
    from visiontuner.tracking.client import Store

    store, reference = Store(tracking_uri(), advice=_ADVICE), ModelReference.parse(model)
    if not (reference.version or reference.alias) and CHAMPION in aliases(store, reference.name):
        reference = ModelReference(name=reference.name, alias=CHAMPION)
    version = find_version(store, reference)
    return f"models:/{version.name}/{version.version}"
