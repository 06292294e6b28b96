"""Export a network and run it once over a folder's images in ONNX Runtime; a plain loop.

    python network_pass.py IMAGES NETWORK SPLIT,SPLIT LIMIT

LIMIT is how many images of each class are taken, 0 for all.
Prints JSON: seconds of the export and of the pass (decoding included), and images. It takes from
visiontuner how to read an image and how to export, and nothing else.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import onnxruntime

from visiontuner.data.dataset import load_dataset
from visiontuner.data.images import Preprocessing, normalise, read_pixels
from visiontuner.model.backbones import load_backbone
from visiontuner.model.onnx import export_backbone

BATCH = 16


def main() -> None:
    root, network, splits = Path(sys.argv[1]), sys.argv[2], sys.argv[3].split(",")
    cache = Path(os.environ["VISIONTUNER_CACHE"])
    dataset = load_dataset(root, limit_per_class=int(sys.argv[4]) or None, cache=cache)
    paths = [dataset.root / sample.path for name in splits for sample in dataset.splits[name]]
    backbone = load_backbone(network, cache=cache)
    began = time.monotonic()
    exported = export_backbone(backbone, cache=cache)
    export_seconds = time.monotonic() - began

    began = time.monotonic()
    options = onnxruntime.SessionOptions()
    # Waiting threads would spin and take the cores from the one that decodes.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(exported, options, providers=["CPUExecutionProvider"])
    features = [
        session.run(["features"], {"image": normalise(pixels, backbone.preprocessing)})[0]
        for pixels in decoded(paths, backbone.preprocessing)
    ]
    pass_seconds = time.monotonic() - began
    print(
        json.dumps(
            {
                "export_seconds": export_seconds,
                "pass_seconds": pass_seconds,
                "images": int(np.concatenate(features).shape[0]),
            }
        )
    )


def decoded(paths: list[Path], preprocessing: Preprocessing) -> Iterator[np.ndarray]:
    """Batches of pixels, uint8 (B, H, W, 3), decoded in a thread while the network runs."""
    remaining = iter(paths)
    chunks = iter(lambda: list(islice(remaining, BATCH)), [])
    with ThreadPoolExecutor(1) as pool:
        yield from pool.map(
            lambda chunk: np.stack([read_pixels(path, preprocessing) for path in chunk]), chunks
        )


if __name__ == "__main__":
    main()
