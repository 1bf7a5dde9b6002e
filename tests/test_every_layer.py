"Every convolution and linear layer is counted, and packed where that is possible; what can't be stored is seen before any work."
import aquatic_nb # noqa: F401  first: torchvision may lack its operators
import math
import warnings

import pytest
import torch
from diffusers import ModelMixin, UNet1DModel, UNet2DConditionModel, UNet3DConditionModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from hypothesis import given, settings, strategies as st
from torch import nn

from aquatic_nb.aq import Scheme
from aquatic_nb.calib import input_moments
from aquatic_nb.core import generator
from aquatic_nb.encode import encode_rows, storable
from aquatic_nb.hub import dequantize, load_quantized, save_quantized
from aquatic_nb.kaq import by_output, from_output, weight_shape
from aquatic_nb.layers import packed_layers
from aquatic_nb.pack import encode_model, pack
from aquatic_nb.quant import plan, quantize, quant_report
from packed_models import conditional
from plain_nets import ResearchUNet

QUICK = dict(laq=False, beam=1, sweeps=1, progress=False)
CONVS = {1: (nn.Conv1d, nn.ConvTranspose1d), 2: (nn.Conv2d, nn.ConvTranspose2d), 3: (nn.Conv3d, nn.ConvTranspose3d)}

class Doubled(nn.Linear):
    def forward(self, x): return 2*super().forward(x)

class AnyLayers(ModelMixin, ConfigMixin):
    "A little of everything, on sounds."
    @register_to_config
    def __init__(self, width=48):
        super().__init__()
        self.a, self.b = nn.Conv1d(4, width, 5, padding=2), nn.ConvTranspose1d(width, width, 4, stride=2, padding=1)
        self.c, self.d, self.e = nn.Conv1d(width, 4, 3, stride=2, padding=1), Doubled(12, 12), nn.Linear(12, 12, bias=False)
    def forward(self, sample, timestep=0): return self.e(self.d(self.c(torch.relu(self.b(torch.relu(self.a(sample)))))))

def unet1d():
    return UNet1DModel(sample_size=32, in_channels=2, out_channels=2, block_out_channels=(32, 32), layers_per_block=1, extra_in_channels=64,
                       down_block_types=('DownBlock1DNoSkip', 'DownBlock1D'), up_block_types=('UpBlock1D', 'UpBlock1DNoSkip'), mid_block_type='UNetMidBlock1D')

def unet3d():
    return UNet3DConditionModel(sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=8, attention_head_dim=4,
                                norm_num_groups=4, down_block_types=('CrossAttnDownBlock3D', 'DownBlock3D'), up_block_types=('UpBlock3D', 'CrossAttnUpBlock3D'))

CASES = {'sounds': (unet1d, lambda g: dict(sample=torch.randn(2, 2, 32, generator=g), timestep=7)),
         'videos': (unet3d, lambda g: dict(sample=torch.randn(1, 4, 1, 4, 4, generator=g), timestep=7, encoder_hidden_states=torch.randn(1, 3, 8, generator=g))),
         'of everything': (AnyLayers, lambda g: dict(sample=torch.randn(3, 4, 12, generator=g)))}

def weights(model): return sum(m.weight.numel() for m in model.modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd)))

@pytest.mark.parametrize('name, laq', [*((n, False) for n in CASES), ('sounds', True), pytest.param('videos', True, marks=pytest.mark.slow), ('of everything', True)])
def test_everything_is_counted_packed_and_saved(name, laq, tmp_path):
    make, inputs = CASES[name]
    torch.manual_seed(0)
    model, calls = make().eval(), [inputs(generator(i, 'x')) for i in range(4)]
    count, before = weights(model), model(**calls[0])[0]
    told = plan(model, 8.6)
    quantize(model, 8.6, calibration=calls, **QUICK | dict(laq=laq))
    report = quant_report(model)
    assert report.attrs['weights'] == count == sum(map(math.prod, report['shape']))
    assert 4 < report.attrs['bits'] <= 8.6
    stay = report[report.scheme == 'dense']
    assert not stay.note.eq('').any() or laq               # whatever stays dense says why, unless bits were to spare
    if not laq: assert dict(zip(told.layer, told.bytes)) == dict(zip(report.layer, report.bytes))
    after = model(**calls[0])[0]
    assert (after - before).pow(2).mean() < .01*before.pow(2).mean()
    if name == 'of everything': return                     # a class that diffusers does not know cannot be opened by name
    save_quantized(model, tmp_path/'m')
    again = load_quantized(tmp_path/'m')
    assert torch.equal(again(**calls[0])[0], after)
    assert packed_layers(again).keys() == packed_layers(model).keys()
    dense = dequantize(again)
    assert weights(dense) == count and not packed_layers(dense)
    torch.testing.assert_close(dense(**calls[0])[0], after, rtol=1e-2, atol=1e-2*float(after.abs().max()))

@pytest.mark.parametrize('seed', range(24))
def test_any_convolution_packs_to_what_it_was(seed):
    g = generator(seed, 'conv')
    draw = lambda lo, hi: int(torch.randint(lo, hi + 1, (), generator=g))
    dims, groups = 1 + seed % 3, draw(1, 3)
    cls = CONVS[dims][seed//3 % 2]
    k, stride, dilation = ([draw(1, 3) for _ in range(dims)] for _ in range(3))
    kw = dict(stride=stride, dilation=dilation, groups=groups, bias=bool(draw(0, 1)), padding=[draw(0, (a - 1)*b) for a, b in zip(k, dilation)])
    if cls in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d): kw['output_padding'] = [draw(0, max(a, b) - 1) for a, b in zip(stride, dilation)]
    layer = cls(2*groups, 3*groups, tuple(k), **kw)
    x = torch.randn(2, 2*groups, *(draw(6, 9) for _ in range(dims)), generator=g)
    assert torch.equal(from_output(layer, by_output(layer)), layer.weight)
    model = nn.Sequential(layer)
    H = input_moments(model, [dict(input=x)], ['0'], rows_per_input=10**6)['0'].H
    assert H.shape[0] == math.prod(weight_shape(layer)[1:])
    # the mean square of the answer without its bias is what the moments say
    W, y = by_output(layer).double().flatten(1), layer(x).double() - (0 if layer.bias is None else layer.bias.double().reshape(-1, *[1]*dims))
    if groups == 1:
        said = ((W @ H.double())*W).sum(1)
        torch.testing.assert_close(said, y.transpose(0, 1).flatten(1).pow(2).mean(1).detach(), rtol=1e-4, atol=1e-7)
    pack(model, encode_model(model, {'0': Scheme(1, 8, 1, kind='uniform')}, [dict(input=x)]))
    want = layer(x)
    assert type(model[0]) is not cls and isinstance(model[0], cls)
    assert (model(x) - want).pow(2).mean() < 1e-3*want.pow(2).mean() + 1e-9
    assert torch.equal(by_output(model[0]), model[0].decoded) and model[0].weight.shape == layer.weight.shape
    assert model[0](x[0]).shape == layer(x[0]).shape                    # a single one, without a batch
    if cls is nn.ConvTranspose2d:
        layer.output_padding = model[0].output_padding = (0, 0)
        size = [a + b - 1 for a, b in zip(layer(x).shape[2:], stride)]
        assert model[0](x, output_size=size).shape == layer(x, output_size=size).shape

SCHEMES = [Scheme(2, 6, 9), Scheme(1, 1, 9), Scheme(4, 4, 8, 'fp16'), Scheme(1, 8, 1, kind='uniform'), Scheme(1, 2, 1, kind='uniform'), Scheme(3, 4, 9)]

@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(-9, 7), st.floats(0, 4), st.sampled_from(SCHEMES))
def test_what_is_called_storable_is_stored(seed, size, spread, scheme):
    g = generator(seed, 'sizes')
    W = 10**size*torch.randn(12, 36, generator=g)*10**(-spread*torch.rand(12, 1, generator=g))
    if storable(W): assert encode_rows(W, None, scheme, beam=1, sweeps=1).What.isfinite().all()

@pytest.mark.parametrize('laq', [False, True])
def test_a_layer_that_no_scale_can_hold_stays_dense_and_is_named(laq):
    model, name = conditional(), 'mid_block.resnets.0.conv1'
    with torch.no_grad(): model.get_submodule(name).weight.mul_(1e-9)
    told = plan(model, 12.5).set_index('layer')
    assert told.scheme[name] == 'dense' and 'fp16' in told.note[name]
    g = generator(0, 'x')
    calls = [dict(sample=torch.randn(2, 3, 8, 8, generator=g), timestep=t, encoder_hidden_states=torch.randn(2, 3, 8, generator=g)) for t in (1, 400, 900)]
    with pytest.warns(UserWarning, match=f"'{name}' stays dense"): quantize(model, 12.5, calibration=calls, overrides={name: (2, 8)}, **QUICK | dict(laq=laq))
    found = quant_report(model).set_index('layer')
    assert found.scheme[name] == 'dense' and 'fp16' in found.note[name] and quant_report(model).attrs['bits'] <= 12.5

def test_small_weights_are_packed_with_coarser_codebooks():
    model, name = conditional(), 'mid_block.resnets.0.conv1'
    with torch.no_grad(): model.get_submodule(name).weight.mul_(5e-5/model.get_submodule(name).weight.std())
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        quantize(model, 7, calibration=None, overrides={name: (2, 6)}, **QUICK)
    assert name in packed_layers(model) and packed_layers(model)[name].info['error'] < .2

@pytest.mark.parametrize('laq', [False, True])
def test_the_first_parameter_does_not_price_the_others(laq):
    "Mixed dtypes: what stays dense costs what it has."
    model = conditional().half()
    model.conv_in.float()
    model.conv_in.register_forward_pre_hook(lambda m, args: (args[0].float(),))
    model.conv_in.register_forward_hook(lambda m, args, y: y.half())
    g = generator(0, 'x')
    told = plan(model, 9, {'*to_q': 'dense'})
    calls = [dict(sample=torch.randn(2, 3, 8, 8, generator=g).half(), timestep=t, encoder_hidden_states=torch.randn(2, 3, 8, generator=g).half()) for t in (1, 400, 900)]
    quantize(model, 9, overrides={'*to_q': 'dense'}, calibration=calls if laq else None, **QUICK | dict(laq=laq))
    report = quant_report(model)
    assert report.attrs['bits'] <= 9
    dense = report[report.layer.str.endswith('to_q')]
    assert set(dense.bits) == {16.} and set(told[told.layer.str.endswith('to_q')].bits) == {16.}
    if not laq: assert dict(zip(told.layer, told.scheme)) == dict(zip(report.layer, report.scheme))

def test_inputs_that_cannot_be_made_up_are_refused_in_one_sentence():
    odd = dict(sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=8, attention_head_dim=2, norm_num_groups=4,
               down_block_types=('CrossAttnDownBlock2D', 'DownBlock2D'), up_block_types=('UpBlock2D', 'CrossAttnUpBlock2D'))
    for model in (unet3d(), UNet2DConditionModel(**odd, class_embed_type='projection', projection_class_embeddings_input_dim=6),
                  UNet2DConditionModel(**odd, addition_embed_type='image', encoder_hid_dim=8), UNet2DConditionModel(**odd, encoder_hid_dim_type='image_proj', encoder_hid_dim=8)):
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.raises(ValueError, match=f"calibration='auto'.*{type(model).__name__}.*record_inputs"): quantize(model, 4, **QUICK)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and not packed_layers(model)

# ---- modules of any kind ----

def research_calls(n=4, samples=3):
    g = generator(0, 'calls')
    return [((torch.randn(samples, 3, 16, 16, generator=g)*s, torch.full((samples,), t)), dict(y=torch.randint(0, 10, (samples,), generator=g)))
            for s, t in zip((80., 20., 3., .5), (999, 700, 400, 50))][:n]

@pytest.mark.parametrize('laq', [False, True])
def test_a_research_unet_goes_all_the_way(tmp_path, laq):
    "Plain modules, 1x1 Conv1d, einsum: quantized, reported, saved without code, loaded into a module or by a function, equal."
    torch.manual_seed(0)
    net, calls = ResearchUNet(16, blocks=1).eval(), research_calls()
    count, (args, kw) = weights(net), calls[2]
    want = net(*args, **kw).detach()
    quantize(net, 7, act_bits=8, calibration=calls, work_dir=tmp_path/'work', **QUICK | dict(laq=laq))
    report = quant_report(net)
    assert report.attrs['weights'] == count and report.attrs['bits'] <= 7 and (laq or (report.scheme != 'dense').all())
    got = net(*args, **kw).detach()
    assert (got - want).pow(2).mean() < .05*want.pow(2).mean()
    save_quantized(net, tmp_path/'m')
    assert {o.suffix for o in (tmp_path/'m').iterdir()} == {'.json', '.safetensors'}
    for own in (ResearchUNet(16, blocks=1).eval(), lambda: ResearchUNet(16, blocks=1).eval()):
        again = load_quantized(own, tmp_path/'m')
        assert torch.equal(again(*args, **kw), got) and packed_layers(again).keys() == packed_layers(net).keys()
    with pytest.raises(ValueError, match='weights and config belong to different models|expected|codes of'): load_quantized(ResearchUNet(16, mult=(1, 1), blocks=1), tmp_path/'m')
    with pytest.raises(ValueError, match='plain_nets.ResearchUNet.*module_or_function'): load_quantized(tmp_path/'m')
    with pytest.raises(TypeError, match='got NoneType that'): load_quantized(lambda: None, tmp_path/'m')
    dense = dequantize(again)
    assert not packed_layers(dense) and weights(dense) == count

def test_plain_modules_ask_for_inputs():
    net = ResearchUNet(16, blocks=1)
    with pytest.raises(ValueError, match='ResearchUNet is a plain module.*args, kwargs'): quantize(net, 4, **QUICK)
    with pytest.raises(ValueError, match='entry 0 does not fit ResearchUNet.forward'): quantize(net, 4, calibration=[dict(image=torch.zeros(1, 3, 16, 16))], **QUICK)
    run = lambda: [net(*a, **k) for a, k in research_calls(2)]
    assert packed_layers(quantize(net, 8, calibration=run, **QUICK))

def test_a_flipped_bit_of_a_plain_folder_is_found(tmp_path):
    torch.manual_seed(0)
    save_quantized(quantize(ResearchUNet(16, blocks=1), 8, calibration=None, **QUICK), tmp_path/'m')
    file = tmp_path/'m'/'model.safetensors'
    raw = bytearray(file.read_bytes()); raw[len(raw)//2] ^= 4; file.write_bytes(raw)
    with pytest.raises(ValueError, match='checksum'): load_quantized(ResearchUNet(16, blocks=1), tmp_path/'m')

def test_what_no_file_can_hold_is_named(tmp_path):
    net = quantize(ResearchUNet(16, blocks=1), 8, calibration=None, **QUICK)
    net.register_buffer('rotary', torch.zeros(3, dtype=torch.complex64))
    with pytest.raises(ValueError, match="'rotary'.*persistent=False"): save_quantized(net, tmp_path/'m')
    assert not (tmp_path/'m').exists()

# ---- layers that are not alone ----

class Twice(nn.Module):
    "One module under two names, and weights that other modules hold, too."
    def __init__(self, tie):
        super().__init__()
        self.a, self.c, self.d, self.e = nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 24), nn.Embedding(24, 24)
        self.b = nn.ModuleDict(dict(inside=self.a))
        if tie == 'layer': self.d.weight = self.c.weight
        if tie == 'embedding': self.d.weight = self.e.weight
    def forward(self, x): return self.d(self.c(self.b['inside'](self.a(x))))

@pytest.mark.parametrize('tie', [None, 'layer', 'embedding'])
@pytest.mark.parametrize('laq', [False, True])
def test_layers_under_two_names_and_tied_weights(tie, laq):
    torch.manual_seed(0)
    net, x = Twice(tie).half(), torch.randn(64, 24).half()
    want, own = net(x).detach().float(), {None: 3, 'layer': 2, 'embedding': 3}[tie]*24*24
    quantize(net, 16, calibration=[dict(x=x)], overrides={'a': 8}, **QUICK | dict(laq=laq))
    report = quant_report(net)
    assert report.attrs['weights'] == own and report.attrs['bits'] <= 16
    assert net.a is net.b['inside'] and type(net.a) is not nn.Linear
    if tie == 'layer': assert net.c.weight is net.d.weight and 'd.weight' in report.set_index('layer').note['c']
    if tie == 'embedding': assert net.d.weight is net.e.weight and 'e.weight' in report.set_index('layer').note['d']
    got = net(x).detach().float()
    assert (got - want).pow(2).mean() < .01*want.pow(2).mean()
    dequantize(net)
    assert type(net.a) is nn.Linear and net.a is net.b['inside']

def test_odd_layers_are_left_or_named():
    with pytest.raises(ValueError, match='itself a Linear.*Sequential'): quantize(nn.Linear(8, 8), 8, calibration=None, **QUICK)
    net = nn.Sequential(nn.Linear(32, 32), nn.Linear(0, 4), nn.Linear(32, 32).to(torch.float8_e4m3fn))
    quantize(net, 9, calibration=None, **QUICK)
    assert list(packed_layers(net)) == ['0'] and 'float8' in quant_report(net).set_index('layer').note['2']
    net = nn.Sequential(nn.Linear(64, 64), Doubled(32, 32))
    with pytest.raises(ValueError, match="nearest possible.*1 stay dense.*'1': Doubled"): quantize(net, 4, calibration=None, **QUICK)

@pytest.mark.parametrize('layer, x', [(nn.Linear(8, 8), (2, 8)), *((cls(8, 8, 3), (2, 8, *[5]*d)) for d, both in CONVS.items() for cls in both)], ids=lambda o: type(o).__name__)
def test_the_input_may_be_named_as_in_pytorch(layer, x):
    "UNetMotionModel calls `proj_in(input=x)`."
    net, x = nn.Sequential(layer), torch.randn(x)
    pack(net, encode_model(net, {'0': Scheme(1, 8, 1, kind='uniform')}, [dict(input=x)]))
    assert torch.equal(net[0](input=x), net[0](x))
