__version__ = "0.1.0"

from . import core  # first of all: adds torchvision's operators where they are missing

core.when_imported('diffusers.quantizers.auto', core.register_backend)  # save_pretrained and from_pretrained know packed models
core.when_imported('aquatic_nb.layers', core.register_kernels)          # packed layers find the fast kernels
