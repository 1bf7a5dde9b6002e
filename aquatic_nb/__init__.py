__version__ = "0.1.0"

# The reception, written by hand. Importing the package must import nothing heavy, and still diffusers has to find
# packed models, and packed layers their kernels: only here may rooms be entered late.
from importlib import import_module

from . import core  # first of all: adds torchvision's operators where they are missing


class _NoConfig:
    "Stands in the dictionary of transformers, whose models are not packed: the name has to be in both."
    def __init__(self, bits=None, act_bits=None, shared_codebooks=None, format_version=1,
                 quant_method='aquatic', **unknown):
        raise ValueError("quant_backend='aquatic' packs models of diffusers, and this pipeline has one of "
                         "transformers: name the others in components_to_quantize, e.g. ['unet'], or give a "
                         'quant_mapping')


class _Config(_NoConfig):
    "Stands for `hub.AquaticConfig` in diffusers' dictionary until it is needed; diffusers compares the arguments."
    def __new__(cls, *args, **kwargs):
        from .hub import AquaticConfig
        return AquaticConfig(*args, **kwargs)

    @staticmethod
    def from_dict(entry, **kwargs):
        from .hub import AquaticConfig
        return AquaticConfig.from_dict(entry, **kwargs)


def _quantizer(config, **kwargs):
    "Stands for `hub.AquaticQuantizer` until it is needed."
    from .hub import AquaticQuantizer
    return AquaticQuantizer(config, **kwargs)


def _register_backend(auto):
    "Add the method `aquatic` to diffusers' dictionaries of quantization backends."
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault('aquatic', _Config)
    auto.AUTO_QUANTIZER_MAPPING.setdefault('aquatic', _quantizer)


def _register_backend_name(auto):
    "Let `PipelineQuantizationConfig(quant_backend='aquatic')` find the name where it looks for it, too."
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault('aquatic', _NoConfig)


def _register_finish(pack):
    "Let `quantize` begin and end with a model that diffusers can save; where diffusers is absent, so are its models."
    def check(model):
        from .hub import check_savable
        check_savable(model)

    def finish(model, bits):
        from .hub import attach
        attach(model, bits)
    pack.CHECK.append(check)
    pack.FINISH.append(finish)


def _register_kernels(layers):
    "Import the rooms whose kernels packed layers can run on: the CPU's, and the GPU's where there is one."
    from . import cpu  # noqa: F401
    if core.torch.cuda.is_available(): from . import cuda  # noqa: F401


core.when_imported('diffusers.quantizers.auto', _register_backend)         # from_pretrained knows packed models
core.when_imported('transformers.quantizers.auto', _register_backend_name) # pipelines know the name
core.when_imported(f'{__name__}.pack', _register_finish)                     # a quantized model is one that diffusers saves
core.when_imported(f'{__name__}.layers', _register_kernels)                # packed layers find the fast kernels

_DOORS = dict(samples='eval.samples', **{o: o for o in (
    'bench', 'calib', 'cpu', 'format', 'hub', 'layers', 'ldm4', 'metrics', 'proof', 'quant', 'zoo')})


def __getattr__(name):
    "A door after a plain `import aquatic_nb`: the room behind `aquatic_nb.quant` is entered when it is first named."
    if name in _DOORS: return import_module(f'.{_DOORS[name]}', __name__)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
