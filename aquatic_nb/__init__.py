__version__ = "0.1.0"

from . import core  # first of all: adds torchvision's operators where they are missing
