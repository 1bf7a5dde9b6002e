__version__ = "0.1.0"

# The reception. Only here are rooms of this package named by strings: importing the package must import nothing
# heavy, and still diffusers has to find packed models, and packed layers their kernels.
from importlib import import_module

from . import core  # first of all: adds torchvision's operators where they are missing


class _Config:
    "Stands for `hub.AquaticConfig` in diffusers' dictionary until it is needed."
    def __new__(cls, *args, **kwargs): return import_module('aquatic_nb.hub').AquaticConfig(*args, **kwargs)

    def __init__(self, bits=None, act_bits=None, shared_codebooks=None, format_version=1,
                 quant_method='aquatic', **unknown): pass # diffusers looks at the names

    @staticmethod
    def from_dict(entry, **kwargs): return _Config.__new__(_Config).from_dict(entry, **kwargs)


class _NoConfig:
    "Stands in the dictionary of transformers, whose models are not packed: the name has to be in both."
    def __init__(self, bits=None, act_bits=None, shared_codebooks=None, format_version=1,
                 quant_method='aquatic', **unknown):
        raise ValueError("quant_backend='aquatic' packs models of diffusers, and this pipeline has one of "
                         "transformers: name the others in components_to_quantize, e.g. ['unet'], or give a "
                         'quant_mapping')


def _quantizer(config, **kwargs):
    "Stands for `hub.AquaticQuantizer` until it is needed."
    return import_module('aquatic_nb.hub').AquaticQuantizer(config, **kwargs)


def _register_backend(auto):
    "Add the method `aquatic` to diffusers' dictionaries of quantization backends."
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault('aquatic', _Config)
    auto.AUTO_QUANTIZER_MAPPING.setdefault('aquatic', _quantizer)


def _register_backend_name(auto):
    "Let `PipelineQuantizationConfig(quant_backend='aquatic')` find the name where it looks for it, too."
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault('aquatic', _NoConfig)


def _register_kernels(layers):
    "Import the rooms whose kernels packed layers can run on: the CPU's, and the GPU's where there is one."
    import_module('aquatic_nb.cpu')
    if core.torch.cuda.is_available(): import_module('aquatic_nb.cuda')


core.when_imported('diffusers.quantizers.auto', _register_backend)         # from_pretrained knows packed models
core.when_imported('transformers.quantizers.auto', _register_backend_name) # pipelines know the name
core.when_imported('aquatic_nb.layers', _register_kernels)                 # packed layers find the fast kernels

_DOORS = dict(samples='eval.samples', **{o: o for o in (
    'bench', 'calib', 'cpu', 'format', 'hub', 'layers', 'ldm4', 'metrics', 'quant', 'zoo')})


def __getattr__(name):
    "A door after a plain `import aquatic_nb`: the room behind `aquatic_nb.quant` is entered when it is first named."
    if name in _DOORS: return import_module(f'aquatic_nb.{_DOORS[name]}')
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
