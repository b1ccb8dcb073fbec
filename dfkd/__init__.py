"""dfkd: data-free model compression from trained classifiers alone."""

from dfkd.compress.fit import fit
from dfkd.compress.prune import prune
from dfkd.compress.quantize import quantize
from dfkd.recipe import Recipe
from dfkd.stream import SyntheticStream
from dfkd.synthesis import Synthesizer
from dfkd.teachers import Teacher, load_zoo

__all__ = ["Recipe", "Synthesizer", "SyntheticStream", "Teacher", "fit", "load_zoo", "prune", "quantize"]
