"""Networks from latents and labels to images in [0, 1], a table of them, their files. Needs torch, safetensors."""

from generators.base import ImageGenerator
from generators.conv import ConvGenerator
from generators.files import GeneratorError, build_generator, load_generator, save_generator
from generators.pixels import PixelGenerator
from generators.pool import PoolGenerator

GENERATORS: dict[str, type[ImageGenerator]] = {"conv": ConvGenerator, "pixels": PixelGenerator, "pool": PoolGenerator}

__all__ = [
    "GENERATORS",
    "ConvGenerator",
    "GeneratorError",
    "ImageGenerator",
    "PixelGenerator",
    "PoolGenerator",
    "build_generator",
    "load_generator",
    "save_generator",
]
