"""Ask an endpoint, a server or a model what is on images."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from PIL import Image

from visiontuner.data.images import read_pixels
from visiontuner.errors import BadImageError, UserMistake, VisiontunerError
from visiontuner.io.aws import Aws
from visiontuner.model.classifier import Classifier
from visiontuner.serving.answers import MAX_PIXELS, Options
from visiontuner.serving.async_client import open_endpoint
from visiontuner.serving.client import (
    REQUEST_BYTES,
    ClassifierFolder,
    HttpTransport,
    ImageAnswer,
    ImageSource,
    Transport,
    ask_all,
    find_images,
    open_model,
)
from visiontuner.workflow.promote import model_folder


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
    explain: Path | None = None,
    progress: Callable[[str, int, int, str], None] = lambda *_: None,
) -> Iterator[ImageAnswer]:
    """Answers for images, in their order, as they come.

    Args:
        sources: files, folders, http(s) URLs, `-` for standard input.
        endpoint: a SageMaker endpoint's name; exactly one of `endpoint`, `url` and `model`.
        url: of a scoring server.
        model: a classifier, model or search folder, or a registered model; its classifier is asked
            in this process, and no code that comes with it is run.
        region: of the endpoint; the one that AWS's own settings name if None.
        assume_role: ARN of a role to ask the endpoint as.
        threshold: answers below it are not confident; the classifier's own if None.
        workers: requests under way at a time.
        request_bytes: the largest request; what the other side takes if None.
        explain: a folder for an image each that shows what decided; for a `model` alone.

    Raises:
        UserMistake: an option breaks a rule, or there is no such model.
        ClassifierError: `explain`, and the model has no heat maps.
        VisiontunerError: nothing can be written into that folder.
        ServingError: nothing answers.
    """

    if [endpoint, url, model].count(None) != 2:
        raise UserMistake("Name an endpoint, a server's URL or a model: one of them.")
    options = Options.chosen(top_k, threshold)
    if explain is not None and model is None:
        raise UserMistake(
            "--explain draws what the artifact itself says: ask it with --model, not a server."
        )
    images = find_images(sources)
    with _way(endpoint, url, model, region, assume_role, request_bytes) as transport:
        if explain is not None and isinstance(transport, ClassifierFolder):
            images = _explained(images, transport.classifier, explain)
        answers = ask_all(transport, images, options, workers=1 if model else workers)
        for done, answer in enumerate(answers, 1):
            progress("Asking", done, len(images), "images")
            yield answer


def _explained(
    images: Sequence[ImageSource], classifier: Classifier, folder: Path
) -> list[ImageSource]:
    """The same images; whoever reads one has its heat map drawn."""
    # Safetensors need not be there for other queries.
    from visiontuner.model.heatmaps import Explainer

    explainer = Explainer(classifier)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise VisiontunerError(f"Cannot write {folder} ({error.strerror}).") from None

    def read(number: int, image: ImageSource) -> bytes:
        content = image.read()
        with suppress(BadImageError):  # the answer says why
            pixels = read_pixels(content, classifier.preprocessing, max_pixels=MAX_PIXELS)
            (heat,) = explainer.explain(pixels[None])
            file = folder / _file_name(number, image.name, classifier.class_names[heat.label])
            try:
                Image.fromarray(heat.over(pixels)).save(file)
            except OSError as error:
                raise VisiontunerError(f"Cannot write {file} ({error.strerror}).") from None
        return content

    return [
        ImageSource(name=image.name, read=partial(read, number, image))
        for number, image in enumerate(images, 1)
    ]


def _file_name(number: int, image: str, label: str) -> str:
    """`0003 beach (beagle).png`: the image's place in the answers, its name and the answer."""
    name = Path(urlsplit(image).path).stem or "image"
    return re.sub(r"[^\w .()-]", "_", f"{number:04d} {name[:60]} ({label[:60]})") + ".png"


@contextmanager
def _way(
    endpoint: str | None,
    url: str | None,
    model: str | None,
    region: str | None,
    assume_role: str | None,
    limit: int | None,
) -> Iterator[Transport]:
    if model is not None:
        with model_folder(model) as folder:
            yield open_model(folder)
    elif url is not None:
        yield HttpTransport(url, body_limit=limit or REQUEST_BYTES)
    elif assume_role is not None:
        aws = Aws(region, assume_role)
        yield open_endpoint(
            endpoint or "", region=aws.region, body_limit=limit, session=aws.session
        )
    else:
        yield open_endpoint(endpoint or "", region=region, body_limit=limit)
