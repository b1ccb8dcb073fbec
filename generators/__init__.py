"""Networks from latents and labels to images in [0, 1], a table of them, their files. Needs torch, safetensors."""

from generators.base import ImageGenerator
from generators.conv import ConvGenerator
from generators.files import GeneratorError, build_generator, load_generator, save_generator

GENERATORS: dict[str, type[ConvGenerator]] = {"conv": ConvGenerator}

__all__ = [
    "GENERATORS",
    "ConvGenerator",
    "GeneratorError",
    "ImageGenerator",
    "build_generator",
    "load_generator",
    "save_generator",
]
