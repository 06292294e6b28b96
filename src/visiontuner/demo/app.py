"""The application behind the page: an image in, the answer with all that explains it out.

It answers this machine alone, and its pages load nothing from elsewhere (a content security policy
says so to the browser).
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from numpy.typing import NDArray
from PIL import Image
from starlette.middleware.trustedhost import TrustedHostMiddleware

from visiontuner.data.images import decode_image, read_pixels
from visiontuner.errors import BadImageError, BusyError
from visiontuner.model.classifier import (
    FEATURE_MAP,
    FEATURES,
    REFERENCE,
    Classifier,
    reference_entries,
)
from visiontuner.model.heatmaps import Explainer
from visiontuner.serving.answers import MAX_BYTES, MAX_PIXELS, Options, answer

_PAGE = Path(__file__).with_name("page")
_FILES = {"/": "index.html", "/page.js": "page.js", "/page.css": "page.css"}
_KINDS = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
_HOSTS = ["127.0.0.1", "localhost"]
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data:; script-src 'self'; "
    "style-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_THUMBNAIL = 160
_SHOWN = 6  # of the nearest training images


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingImages:
    """Training images whose features an image can be compared with.

    Args:
        root: what the paths are relative to.
        features: float32, shape (N, D), rows of length 1.
        names: N class names.
    """

    root: Path
    paths: Sequence[str]
    names: Sequence[str]
    features: NDArray[np.float32]

    def nearest(self, features: NDArray[np.float32]) -> list[dict[str, Any]]:
        """The most similar ones, the nearest first: number, path, label and cosine.

        Args:
            features: float32, shape (D,).
        """
        length = float(np.linalg.norm(features)) or 1.0
        similarities = self.features @ (features / length)
        return [
            {
                "number": int(row),
                "path": self.paths[row],
                "label": self.names[row],
                "similarity": float(similarities[row]),
            }
            for row in np.argsort(-similarities, kind="stable")[:_SHOWN]
        ]


class Answerer:
    """Answers with what explains them: heat map and nearest training images."""

    def __init__(self, classifier: Classifier, training: TrainingImages | None) -> None:
        self.classifier = classifier
        self.training = training
        self.explainer = Explainer(classifier) if FEATURE_MAP in classifier.output_names else None
        raw = json.loads((classifier.folder / REFERENCE).read_text(encoding="utf-8"))
        self.examples = [
            (str(entry.get("class_name") or ""), base64.b64decode(entry["image"]))
            for entry in reference_entries(raw)
        ]

    def answer(self, content: bytes) -> dict[str, Any]:
        """What `visiontuner query` says of an image, and why.

        Returns:
            Plain JSON values; `error` alone matters where the image cannot be read.

        Raises:
            BusyError: other requests hold large images.
        """
        (said,) = answer(self.classifier, [content], Options(on_error="report"))
        found: dict[str, Any] = said.to_dict()
        if said.error is not None:
            return found
        pixels = read_pixels(content, self.classifier.preprocessing, max_pixels=MAX_PIXELS)
        found["seen"] = _data_url(pixels)
        if self.explainer is not None:
            (heat,) = self.explainer.explain(pixels[None])
            found["heat"] = _data_url(heat.over(pixels))
        if self.training is not None:
            (features,) = self.classifier.outputs(pixels[None], [FEATURES])
            found["nearest"] = self.training.nearest(features[0])
        return found


def build_app(answerer: Answerer, *, title: str) -> FastAPI:
    """The page and what it asks.

    Args:
        title: what the page calls the model.
    """
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=_HOSTS)

    @app.middleware("http")
    async def guard(request: Request, call_next: Any) -> Response:
        response: Response = await call_next(request)
        response.headers.update(_HEADERS)
        return response

    for address, name in _FILES.items():
        app.add_api_route(address, _file(_PAGE / name), include_in_schema=False)

    @app.get("/model")
    def model() -> dict[str, Any]:
        return {
            "title": title,
            "classes": len(answerer.classifier.class_names),
            "examples": [name for name, _ in answerer.examples],
            "heat": answerer.explainer is not None,
            "nearest": answerer.training is not None,
        }

    _add_images(app, answerer)

    @app.post("/answer")
    async def ask(request: Request) -> JSONResponse:
        content = bytearray()
        async for part in request.stream():
            content += part
            if len(content) > MAX_BYTES:
                limit = f"The image has more than the {MAX_BYTES / 1e6:.0f} MB allowed."
                return JSONResponse({"error": limit}, status_code=413)
        try:
            return JSONResponse(await run_in_threadpool(answerer.answer, bytes(content)))
        except BusyError as error:
            return JSONResponse({"error": str(error)}, status_code=429)

    return app


def _add_images(app: FastAPI, answerer: Answerer) -> None:
    """The examples, and the training images that are named as nearest."""

    @app.get("/example/{number}")
    def example(number: int) -> Response:
        if not 0 <= number < len(answerer.examples):
            return Response(status_code=404)
        return Response(answerer.examples[number][1], media_type="application/octet-stream")

    @app.get("/example/{number}/thumbnail")
    def example_thumbnail(number: int) -> Response:
        if not 0 <= number < len(answerer.examples):
            return Response(status_code=404)
        return _thumbnail(answerer.examples[number][1])

    @app.get("/training/{number}")
    def training(number: int) -> Response:
        images = answerer.training
        if images is None or not 0 <= number < len(images.paths):
            return Response(status_code=404)
        return _thumbnail(images.root / images.paths[number])


def _file(path: Path) -> Any:
    content = path.read_bytes()

    def send() -> Response:
        return Response(content, media_type=_KINDS[path.suffix])

    return send


def _thumbnail(image: bytes | Path) -> Response:
    try:
        small = decode_image(image, target=_THUMBNAIL).convert("RGB")
    except (BadImageError, OSError):  # moved or deleted since
        return Response(status_code=404)
    small.thumbnail((_THUMBNAIL * 2, _THUMBNAIL))
    content = io.BytesIO()
    small.save(content, "JPEG", quality=85)
    return Response(content.getvalue(), media_type="image/jpeg")


def _data_url(pixels: NDArray[np.uint8]) -> str:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()
