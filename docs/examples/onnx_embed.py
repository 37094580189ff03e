"""Embed image files with what train/export.py wrote: ONNX Runtime, NumPy and Pillow, no PyTorch.

python onnx_embed.py encoder.onnx photos/cat/*.png
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image

session = onnxruntime.InferenceSession(sys.argv[1])
metadata = session.get_modelmeta().custom_metadata_map
about = {key: json.loads(value) for key, value in metadata.items()}
channels = session.get_inputs()[0].shape[1]


def centre(image: Image.Image, size: int) -> Image.Image:
    """Cut out the centre of an image."""
    left, top = (round((side - size) / 2) for side in image.size)
    return image.crop((left, top, left + size, top + size))


def read(path: str) -> np.ndarray:
    """Read an image as the network takes it: (C, S, S) float32, normalised."""
    image = Image.open(path).convert("L" if channels == 1 else "RGB")
    size = about["resize_size"]
    shape = [size * side // min(image.size) for side in image.size]
    image = image.resize(shape, Image.Resampling.BILINEAR)
    image = centre(centre(image, size), about["crop_size"])
    pixels = np.asarray(image, np.float32).reshape(*image.size, channels) / 255
    return ((pixels - about["mean"]) / about["std"]).astype(np.float32).transpose(2, 0, 1)


images = np.stack([read(path) for path in sys.argv[2:]])
(embeddings,) = session.run(None, {"images": images})  # (N, D), not normalised
print(embeddings.shape)
