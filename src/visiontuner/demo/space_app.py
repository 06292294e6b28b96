"""The page of a Gradio Space: an image in, names with probabilities and what decided out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr

from visiontuner.data.images import read_pixels
from visiontuner.errors import BadImageError, ClassifierError
from visiontuner.model.classifier import Classifier
from visiontuner.model.heatmaps import Explainer

CLASSIFIER = Classifier.load(Path(__file__).with_name("classifier"))
try:
    EXPLAINER: Explainer | None = Explainer(CLASSIFIER)
except ClassifierError:  # of a network without heat maps
    EXPLAINER = None


def answer(path: str | None) -> tuple[dict[str, float], str, Any]:
    """Probabilities by name, what to think of them, and the heat map."""
    if path is None:
        return {}, "", None
    try:
        (best,) = CLASSIFIER.predict([Path(path)])
        pixels = read_pixels(Path(path), CLASSIFIER.preprocessing)
    except BadImageError as error:
        raise gr.Error(str(error)) from None
    said = ["confident" if best.confident else "not sure"]
    if best.known is not None:
        said.append("like the training images" if best.known else "new: perhaps of no class")
    heat = None if EXPLAINER is None else EXPLAINER.explain(pixels[None])[0].over(pixels)
    return dict(best.top_k), ", ".join(said), heat


demo = gr.Interface(
    fn=answer,
    inputs=gr.Image(type="filepath", label="Image"),
    outputs=[
        gr.Label(label="Classes"),
        gr.Textbox(label="The answer is"),
        gr.Image(label="Where the class was seen"),
    ],
    flagging_mode="never",
)

if __name__ == "__main__":
    demo.launch()
