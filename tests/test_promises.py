"""What a packed model promises, each promise tried on generated cases: what can be saved opens again with equal outputs, files of the first
version load bit for bit, the compute dtype is visible, tools that move, trace, transform or walk the model get what a dense one would give."""
import aquatic_nb # noqa: F401  first: torchvision may lack its operators
import copy, hashlib, json, random, subprocess, sys, warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from diffusers import ControlNetModel, PipelineQuantizationConfig, UNet2DConditionModel, UNet2DModel, UNetMotionModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders.ip_adapter import IPAdapterMixin
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from diffusers.models.modeling_utils import ModelMixin
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors.torch import save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from aquatic_nb.act import attach_act
from aquatic_nb.core import generator
from aquatic_nb.hub import AquaticConfig, attach, check_savable, dequantize, load_quantized
from aquatic_nb.kaq import packable
from aquatic_nb.layers import packed_layers, set_kernel, swap
from packed_models import C, KINDS, X, conditional, ddpm, pack_layer, pack_model, plain, run

DATA = Path(__file__).parent/'data'
cases = settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


# the format does not change

def test_a_model_of_the_first_version_loads_bit_for_bit():
    want = json.loads((DATA/'packed_v1'/'expected.json').read_text())
    model = load_quantized(DATA/'packed_v1'/'model')
    def mark(t): return hashlib.sha256(t.detach().float().numpy().tobytes()).hexdigest()[:16]
    assert {n: mark(m.weight) for n, m in packed_layers(model).items()} == want['weights']
    for kernel, most in (('dense', 1e-4), ('auto', 2e-2)): # sums in another order put an 8-bit activation on the next step of its grid
        set_kernel(model, kernel)
        g = torch.Generator().manual_seed(1)
        for t, out in zip((900, 500, 100), want['outputs'], strict=True):
            sample, times = torch.randn(2, 3, 8, 8, generator=g), torch.tensor([t, t])
            with torch.no_grad(): y = model(sample, times, encoder_hidden_states=torch.randn(2, 3, 8, generator=g)).sample
            out = torch.tensor(out)
            assert (y.flatten()[::16] - out).norm() <= most*out.norm()


def test_it_is_saved_with_the_same_bytes(tmp_path):
    load_quantized(DATA/'packed_v1'/'model').save_pretrained(tmp_path)
    name = 'diffusion_pytorch_model.safetensors'
    assert (tmp_path/name).read_bytes() == (DATA/'packed_v1'/'model'/name).read_bytes()


# saving is a promise

def lora(model):
    peft = pytest.importorskip('peft')
    model.add_adapter(peft.LoraConfig(r=2, target_modules=['to_q'], init_lora_weights='gaussian'))

def lora_left(model): lora(model); model.delete_adapters('default')
def lora_gone(model): lora(model); model.unload_lora()

def ip_adapter(model):
    "The smallest IP-Adapter: an image projection, and two matrices for each cross-attention."
    g, size, weights = generator(0, 'ip'), model.config.cross_attention_dim, {}
    for i, name in enumerate(model.attn_processors):
        if not name.endswith('attn2.processor'): continue
        width = model.get_submodule(name.removesuffix('.processor')).to_k.out_features
        weights |= {f'{i}.to_{o}_ip.weight': torch.randn(width, size, generator=g) for o in 'kv'}
    image = {'proj.weight': torch.randn(4*size, 6, generator=g), 'proj.bias': torch.zeros(4*size), 'norm.weight': torch.ones(size), 'norm.bias': torch.zeros(size)}
    model._load_ip_adapter_weights([dict(image_proj=image, ip_adapter=weights)])

def ip_adapter_gone(model):
    ip_adapter(model)
    IPAdapterMixin.unload_ip_adapter(SimpleNamespace(unet=model))

@torch.no_grad()
def fused(model): model.fuse_qkv_projections()
def fused_and_back(model): fused(model); model.unfuse_qkv_projections()

def other_input(model): model.conv_in = nn.Conv2d(9, model.conv_in.out_channels, 3, padding=1)
def told_input(model): model.conv_in = nn.Conv2d(3, model.conv_in.out_channels, 3, padding=1)
def seamless(model):
    for m in model.modules():
        if isinstance(m, nn.Conv2d): m.padding_mode = 'circular'
def other_stride(model): model.conv_out.stride = (2, 2)
def other_activation(model): model.conv_act = nn.GELU()
def other_eps(model): model.conv_norm_out.eps = .1
def more_layers(model): model.tail = nn.Linear(2, 2)
def more_parameters(model): model.mid_block.gain = nn.Parameter(torch.ones(1))
def more_buffers(model): model.register_buffer('mean', torch.zeros(3))
def narrower(model): model.conv_norm_out = nn.GroupNorm(2, 4)
def normed(model): nn.utils.weight_norm(model.conv_out)
def pruned(model):
    from torch.nn.utils import prune
    prune.random_unstructured(model.conv_out, 'weight', .5)

def processors(model): model.set_attn_processor(AttnProcessor())
def trained(model): model.train().requires_grad_(False)
def hooked(model): model.conv_out.register_forward_hook(lambda m, x, y: None)
def copied(model): copy.deepcopy(model)
def renamed(model): model.register_to_config(sample_size=16)

FINE = [lora_gone, ip_adapter_gone, processors, trained, hooked, copied, renamed, told_input]
WRONG = [lora, lora_left, ip_adapter, fused, fused_and_back, other_input, seamless, other_stride, other_activation, other_eps, more_layers,
         more_parameters, more_buffers, narrower, normed, pruned]
NAMES = dict(lora='unload_lora', lora_left='unload_lora', ip_adapter='unload_ip_adapter', fused='to_qkv', fused_and_back='to_qkv', other_input='conv_in',
             seamless='padding_mode', other_stride='conv_out', other_activation='conv_act', other_eps='conv_norm_out', more_layers='tail', more_parameters='gain',
             more_buffers='mean', narrower='conv_norm_out', normed='conv_out', pruned='conv_out')

@pytest.fixture(scope='module')
def packed(): return pack_model(conditional())

@pytest.mark.parametrize('change', WRONG, ids=lambda f: f.__name__)
def test_what_could_not_be_opened_is_refused(change, packed, tmp_path):
    "Before packing, when it was done to the dense model; at save, when it was done to the packed one; and then nothing is written."
    for model in (conditional(), copy.deepcopy(packed)):
        if change in (normed, pruned) and packed_layers(model): model.conv_out = conditional().conv_out
        check_savable(model)
        change(model)
        with pytest.raises(ValueError, match=NAMES[change.__name__]): check_savable(model)
    with pytest.raises(ValueError, match=NAMES[change.__name__]): model.save_pretrained(tmp_path/'m')
    assert not (tmp_path/'m').exists()

def test_what_is_accepted_opens_with_equal_outputs_in_a_new_process(packed, tmp_path):
    "Random combinations of what may be done to a model, before and after it is packed."
    r, script = random.Random(0), []
    torch.save((X, C), tmp_path/'x.pt')
    for i in range(8):
        model = conditional(i)
        for change in r.sample(FINE, r.randrange(len(FINE))): change(model)
        check_savable(model)
        model = pack_model(model.eval(), shared=False)
        for change in r.sample(FINE, r.randrange(len(FINE))): change(model)
        if i % 3 == 0: attach(attach_act(model, 8, [dict(sample=X, timestep=torch.tensor(t), encoder_hidden_states=C) for t in (1, 99)]))
        if i % 2: model = copy.deepcopy(model)
        attach(model) if i % 3 else None
        model.eval().save_pretrained(tmp_path/str(i))
        model.set_attn_processor(AttnProcessor2_0()) # others add in another order
        torch.save(run(model), tmp_path/f'{i}.pt')
        script.append(i)
    code = '''import sys, torch, aquatic_nb
from diffusers import UNet2DConditionModel
folder = sys.argv[1]
x, c = torch.load(f'{folder}/x.pt')
for i in map(int, sys.argv[2:]):
    with torch.no_grad(): y = UNet2DConditionModel.from_pretrained(f'{folder}/{i}')(x, 7, c).sample
    print(i, torch.equal(y, torch.load(f'{folder}/{i}.pt')))'''
    out = subprocess.run([sys.executable, '-c', code, str(tmp_path), *map(str, script)], capture_output=True, text=True)
    assert out.stdout.split('\n')[:-1] == [f'{i} True' for i in script], out.stdout + out.stderr[-3000:]

def test_a_copy_is_judged_by_itself(packed, tmp_path):
    other = copy.deepcopy(packed)
    more_layers(other)
    packed.save_pretrained(tmp_path/'a')
    with pytest.raises(ValueError, match='tail'): other.save_pretrained(tmp_path/'b')
    import pickle
    pickled = pickle.loads(pickle.dumps(packed))
    with pytest.raises(ValueError, match='attach'): pickled.save_pretrained(tmp_path/'c')
    attach(pickled, bits=6).save_pretrained(tmp_path/'c')
    assert torch.equal(run(load_quantized(tmp_path/'c')), run(packed))

def test_an_ip_adapter_can_be_put_on_and_taken_off(packed, tmp_path):
    model = copy.deepcopy(packed)
    ip_adapter(model)
    with torch.no_grad(): y = model(X, 7, C, added_cond_kwargs=dict(image_embeds=[torch.ones(2, 1, 6)])).sample
    assert torch.isfinite(y).all() and not torch.equal(y, run(packed))
    IPAdapterMixin.unload_ip_adapter(SimpleNamespace(unet=model))
    model.save_pretrained(tmp_path)
    assert torch.equal(run(load_quantized(tmp_path)), run(packed))


# dtype

class Chain(ModelMixin, ConfigMixin):
    "Linear layers, with a bias or without."
    @register_to_config
    def __init__(self, biases=(False, True)):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16, bias=b) for b in biases)

    def forward(self, x):
        for m in self.layers: x = m(x)
        return x

@cases
@given(st.lists(st.booleans(), min_size=1, max_size=3), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.data())
def test_the_compute_dtype_is_what_can_be_seen(tmp_path_factory, biases, dtype, data):
    folder = tmp_path_factory.mktemp('chain')
    model = Chain(biases)
    for n, m in packable(model).items(): swap(model, n, pack_layer(m, *data.draw(st.sampled_from([(4, 2, 'int8'), (8, 1, 'fp16'), (9, 2, 'fp16'), (5, 1, 'uniform')]))))
    attach(model).save_pretrained(folder)
    for m in (model.to(dtype), Chain.from_pretrained(folder, torch_dtype=dtype), Chain.from_pretrained(folder).to(dtype), copy.deepcopy(model)):
        assert m.dtype == next(m.parameters()).dtype == next(p for p in m.parameters() if p.is_floating_point()).dtype == dtype
        x = torch.ones(2, 16, dtype=next(m.parameters()).dtype)
        y = m(x)
        assert y.dtype == dtype
        with torch.no_grad(): torch.testing.assert_close(y, dequantize(copy.deepcopy(m))(x), rtol=.02, atol=.02)
    model.load_state_dict({k: v for k, v in model.state_dict().items() if not k.endswith('.like')}) # as a file has it


# tools that move parameters

def share_all(model):
    "One set of codebooks for all layers that could have it: in every block, and in some leaf next to another."
    first = {}
    for layer in packed_layers(model).values():
        if layer.codebooks is not None: layer.codebooks = first.setdefault(layer.scheme, layer.codebooks)
    return attach(model, bits=6)

@pytest.fixture(scope='module')
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp('shared')/'m'
    share_all(pack_model(conditional())).save_pretrained(folder)
    model = load_quantized(folder)
    assert max(map(len, model.hf_quantizer.quantization_config.shared_codebooks.values())) > 5
    return folder, run(model)

@pytest.mark.parametrize('disk', [False, True], ids=['memory', 'disk'])
@pytest.mark.parametrize('how', [dict(offload_type='leaf_level'), dict(offload_type='block_level', num_blocks_per_group=1), dict(offload_type='block_level', num_blocks_per_group=2)], ids=str)
def test_group_offload_with_shared_codebooks(shared, how, disk, tmp_path):
    folder, want = shared
    model, cpu = load_quantized(folder), torch.device('cpu')
    where = dict(onload_device=cpu, offload_device=cpu, **(dict(offload_to_disk_path=str(tmp_path/'groups')) if disk else {}))
    try: conditional().enable_group_offload(**where, **how)
    except AttributeError: pytest.skip('this diffusers offloads no model at all without an accelerator')
    where |= dict(offload_to_disk_path=str(tmp_path/'more')) if disk else {}
    model.enable_group_offload(**where, **how)
    for _ in range(2): assert torch.equal(run(model), want)
    if disk:
        with pytest.raises(ValueError, match='offloaded to disk'): model.save_pretrained(tmp_path/'m')
    else:
        model.save_pretrained(tmp_path/'m')
        assert torch.equal(run(load_quantized(tmp_path/'m')), want)
        name = 'diffusion_pytorch_model.safetensors'
        assert (tmp_path/'m'/name).read_bytes() == (folder/name).read_bytes()

@pytest.mark.parametrize('how', ['cpu', 'disk'])
def test_accelerate_hooks_with_shared_codebooks(shared, how, tmp_path):
    folder, want = shared
    model, here = load_quantized(folder), torch.device('cpu')
    if how == 'cpu': cpu_offload(model, execution_device=here)
    else: disk_offload(model, tmp_path/'off', execution_device=here)
    for _ in range(2): assert torch.equal(run(model), want)
    with pytest.raises(ValueError, match='offload'): model.save_pretrained(tmp_path/'m')

def test_layerwise_casting(packed):
    model = copy.deepcopy(packed)
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    y = run(model)
    assert torch.isfinite(y).all() and (y - run(packed)).norm() < .1*y.norm()
    for n, layer in packed_layers(model).items(): assert layer.scales.dtype == torch.float16 and torch.equal(layer.scales, packed_layers(packed)[n].scales)


# never detached, never wrong

@st.composite
def layers(draw):
    "A dense layer, a packed one that stands for it, and an input."
    g = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    bias, (bits, dtype) = draw(st.booleans()), draw(st.sampled_from(KINDS))
    if draw(st.booleans()): dense, shape = nn.Linear(draw(st.sampled_from([8, 12, 40])), 16, bias=bias), draw(st.sampled_from([(), (3,), (2, 5)]))
    else:
        groups, k = draw(st.sampled_from([1, 1, 2])), draw(st.sampled_from([1, 3, 3, (1, 5)]))
        mode = draw(st.sampled_from(['zeros', 'zeros', 'circular', 'reflect']))
        pad = draw(st.sampled_from([0, 1, 'same'])) if k == 3 else 0
        dense = nn.Conv2d(8, 16, k, stride=1 if pad == 'same' else draw(st.sampled_from([1, 2])), padding=pad, groups=groups, bias=bias, padding_mode=mode)
        shape = draw(st.sampled_from([(2, 8, 9, 7), (1, 8, 16, 16), (8, 6, 7)]))
    with torch.no_grad():
        for p in dense.parameters(): p.copy_(torch.randn(p.shape, generator=g)*.3)
    packed = pack_layer(dense, bits, M=1 if dtype == 'uniform' else 2, dtype=dtype)
    with torch.no_grad(): dense.weight.copy_(packed.weight)
    x = torch.randn(*shape, dense.in_features, generator=g) if isinstance(dense, nn.Linear) else torch.randn(shape, generator=g)
    return dense.requires_grad_(False), packed, x

class Watched(torch.Tensor):
    "A subclass that counts what is done to it."
    calls = 0
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        Watched.calls += 1
        return super().__torch_function__(func, types, args, kwargs or {})

def as_is(f, x): return f(x)
def jvp(f, x): return torch.func.jvp(f, (x,), (x.cos(),))
def gradient(f, x): return torch.func.grad(lambda x: f(x).square().sum())(x)
def backward(f, x):
    x = x.clone().requires_grad_()
    f(x).square().sum().backward()
    return x.grad
def many(f, x): return torch.func.vmap(f)(torch.stack([x, -x, x.sin()]))
def second(f, x): return torch.func.jvp(torch.func.grad(lambda x: f(x).pow(3).sum()), (x,), (x.sin(),))
def dual(f, x):
    with forward_ad.dual_level(): return tuple(forward_ad.unpack_dual(f(forward_ad.make_dual(x, x.cos()))))
def traced(f, x):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return torch.jit.trace(f, x, check_trace=False)(2*x)
def subclassed(f, x):
    y = f(x.as_subclass(Watched))
    assert type(y) is Watched
    return y.as_subclass(torch.Tensor)
def negative(f, x): return f(torch.complex(x, x).conj().imag)                 # a negation that was put off
def of_no_batch(f, x): return f(x[:0]) if x.dim() > 3 or isinstance(f, nn.Linear) and x.dim() > 1 else f(x)
def amp(f, x):
    with torch.autocast('cpu', torch.bfloat16): return f(x)
def inference(f, x):
    with torch.inference_mode(): return f(x)
def exported(f, x): return torch.export.export(f, (x,), strict=False).module()(2*x)
def compiled(f, x):
    torch._dynamo.reset()
    return torch.compile(f, backend='eager', fullgraph=True)(x)
def functional(f, x):
    names = dict(f.named_parameters())
    if 'bias' not in names: return f(x)
    return torch.func.grad(lambda b: torch.func.functional_call(f, {'bias': b}, (x,)).square().sum())(f.bias.detach())

WAYS = [as_is, jvp, gradient, backward, many, second, dual, traced, subclassed, negative, of_no_batch, amp, inference, functional]

@pytest.mark.parametrize('way', WAYS, ids=lambda f: f.__name__)
@cases
@given(layers())
def test_transforms_see_a_dense_layer(way, given):
    dense, packed, x = given
    torch.testing.assert_close(way(packed, x), way(dense, x), rtol=1e-3, atol=1e-3)

@pytest.mark.parametrize('way', [exported, compiled], ids=lambda f: f.__name__)
@settings(parent=cases, max_examples=6)
@given(layers())
def test_compilers_see_a_dense_layer(way, given): test_transforms_see_a_dense_layer.hypothesis.inner_test(way, given)

@pytest.mark.slow
def test_inductor():
    "The compiler that writes its own kernels, on a convolution and what follows."
    torch._dynamo.reset()
    chain = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 4, 1))
    for n, m in list(packable(chain).items()): swap(chain, n, pack_layer(m, 9))
    x = torch.randn(1, 4, 8, 8, generator=generator(0, 'inductor'))
    with torch.no_grad(): torch.testing.assert_close(torch.compile(chain)(x), dequantize(copy.deepcopy(chain))(x), rtol=1e-4, atol=1e-4)

@settings(parent=cases, max_examples=6)
@given(layers())
def test_without_data(given):
    "FakeTensors have shapes only; nothing asks for their data."
    dense, packed, x = given
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode: a, b = packed(mode.from_tensor(x)), dense(mode.from_tensor(x))
    assert a.shape == b.shape and a.dtype == b.dtype and type(a) is type(b)
    with torch.device('meta'): m = x.to('meta')
    assert copy.deepcopy(packed).to('meta')(m).shape == dense(x).shape

@pytest.mark.parametrize('way', [gradient, dual, traced], ids=lambda f: f.__name__)
def test_a_whole_model_is_transformed(way, packed):
    packed = copy.deepcopy(packed).requires_grad_(False)
    packed.set_attn_processor(AttnProcessor())                                 # the fused one has no tangents on a CPU
    dense = dequantize(copy.deepcopy(packed)).requires_grad_(False)
    def call(model): return lambda x: model(x, torch.tensor(7), C[:1].expand(len(x), -1, -1), return_dict=False)[0]
    a, b = way(call(packed), X), way(call(dense), X)
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3*float(torch.cat([o.flatten() for o in (b if isinstance(b, tuple) else (b,))]).abs().max()))


# found by those who look for layers

@cases
@given(layers())
def test_hooks_stay(given):
    dense, _, x = given
    model, seen = nn.Sequential(copy.deepcopy(dense)), []
    handles = [model[0].register_forward_hook(lambda m, a, y: seen.append('after')),
               model[0].register_forward_pre_hook(lambda m, a, k: seen.append('before'), with_kwargs=True),
               model[0].register_full_backward_hook(lambda m, gi, go: seen.append('back'))]
    swap(model, '0', pack_layer(model[0], 4))
    model(x.clone().requires_grad_()).sum().backward()
    assert seen == ['before', 'after', 'back']
    swap(model, '0', copy.deepcopy(dense))
    model(x)
    assert seen[3:] == ['before', 'after']
    for h in handles: h.remove()
    model(x)
    assert len(seen) == 5

@cases
@given(layers(), st.sampled_from(['circular', 'reflect', 'replicate', 'zeros']))
def test_walks_find_packed_layers(given, mode):
    dense, packed, x = given
    model = nn.Sequential(packed)
    if not isinstance(dense, nn.Conv2d): assert [m for m in model.modules() if isinstance(m, nn.Linear)] == [packed]; return
    for m in (*model.modules(), dense):
        if isinstance(m, nn.Conv2d): m.padding_mode = mode
    torch.testing.assert_close(model(x), dense(x), rtol=1e-3, atol=1e-3)
    for m in (packed, dense): m.padding_mode = 'zeros'
    def half(self, x, weight, bias): return nn.functional.conv2d(x, weight*.5, bias, self.stride, 0, self.dilation, self.groups)
    for m in (packed, dense): m._conv_forward = half.__get__(m)                 # as seamless tiling in one direction does
    torch.testing.assert_close(packed(x), dense(x), rtol=1e-3, atol=1e-3)

def test_every_convolution_is_found(packed):
    model, dense = copy.deepcopy(packed), conditional()
    def convs(m): return [n for n, o in m.named_modules() if isinstance(o, nn.Conv2d)]
    assert convs(model) == convs(dense) and not set(packable(model)) & set(packed_layers(model))
    seamless(model)
    same = dequantize(copy.deepcopy(packed))
    seamless(same)
    torch.testing.assert_close(run(model), run(same), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(run(model), run(packed), atol=1e-3)

def test_nothing_is_written_to_a_weight(packed):
    layer = next(iter(packed_layers(packed).values()))
    for value in (nn.Parameter(torch.ones(2)), torch.ones(2)):
        with pytest.raises(AttributeError, match='dequantize'): layer.weight = value
    with pytest.raises(TypeError, match='dequantize'): layer.reset_parameters()
    with pytest.raises(RuntimeError, match='dequantize'): copy.deepcopy(packed).load_state_dict(conditional().state_dict())

@pytest.mark.parametrize('cls, make', [(ControlNetModel, 'from_unet'), (UNetMotionModel, 'from_unet2d')])
def test_models_made_from_a_packed_one(cls, make, packed):
    with pytest.raises(ValueError, match=f'{make}.*dequantize'): getattr(cls, make)(packed)
    with pytest.raises(ValueError, match=f'{make}.*dequantize'): getattr(cls, make)(unet=packed)
    if cls is ControlNetModel: assert cls.from_unet(dequantize(copy.deepcopy(packed)))


# ways in

def test_a_single_file(tmp_path):
    dense = conditional()
    dense.save_pretrained(tmp_path/'dense')
    save_file(dense.state_dict(), tmp_path/'one.safetensors')
    how = dict(config=str(tmp_path/'dense'), local_files_only=True)
    with pytest.warns(UserWarning, match='quantize_unet'): model = UNet2DConditionModel.from_single_file(str(tmp_path/'one.safetensors'), quantization_config=AquaticConfig(bits=6), **how)
    assert len(packed_layers(model)) > 20
    model.save_pretrained(tmp_path/'packed')
    assert torch.equal(run(load_quantized(tmp_path/'packed')), run(model))
    with pytest.raises(ValueError, match='bits=None'): UNet2DConditionModel.from_single_file(str(tmp_path/'one.safetensors'), quantization_config=AquaticConfig(), **how)
    with pytest.raises(ValueError, match='from_pretrained'):
        UNet2DConditionModel.from_single_file(str(tmp_path/'packed'/'diffusion_pytorch_model.safetensors'), quantization_config=AquaticConfig(bits=6), **how)

def test_a_pipeline_by_the_name_of_the_backend(tmp_path):
    "In a new process, where nothing but the package has been imported; and text encoders are not ours."
    ddpm(plain()).save_pretrained(tmp_path)
    code = '''import sys, aquatic_nb, torch
from diffusers import DDPMPipeline, PipelineQuantizationConfig
how = PipelineQuantizationConfig(quant_backend='aquatic', quant_kwargs={'bits': 6}, components_to_quantize=['unet'])
pipe = DDPMPipeline.from_pretrained(sys.argv[1], quantization_config=how)
print(sum('AQ' in type(m).__name__ for m in pipe.unet.modules()) > 10)'''
    out = subprocess.run([sys.executable, '-W', 'ignore', '-c', code, str(tmp_path)], capture_output=True, text=True)
    assert out.stdout.strip() == 'True', out.stderr[-3000:]
    config = PipelineQuantizationConfig(quant_backend='aquatic', quant_kwargs={'bits': 6})
    if not config._get_quant_config_list()[0]: pytest.skip('transformers is not here')
    with pytest.raises(ValueError, match='components_to_quantize.*quant_mapping'): config._resolve_quant_config(is_diffusers=False, module_name='text_encoder')

def test_packing_while_loading_names_the_better_call(tmp_path):
    plain(3).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match='without calibration.*quantize_unet.*bits=6'): UNet2DModel.from_pretrained(tmp_path, quantization_config=AquaticConfig(bits=6))

@pytest.mark.parametrize('name, value', [('conv_in.bias', float('nan')), ('conv_norm_out.weight', float('inf')), ('mid_block.resnets.0.norm1.bias', -float('inf'))])
def test_what_loading_would_refuse_is_refused_before_work_and_at_save(name, value, packed, tmp_path):
    "Not only weights of layers: a bias or a norm that is not finite once ended a run of hours in a file that nothing opens."
    from aquatic_nb.quant import quantize
    for model in (conditional(), copy.deepcopy(packed)):
        check_savable(model)
        with torch.no_grad(): model.get_parameter(name)[0] = value
        with pytest.raises(ValueError, match=f"'{name}' holds NaN or infinity"): check_savable(model)
        if not packed_layers(model):
            with pytest.raises(ValueError, match=f"'{name}' holds NaN or infinity"): quantize(model, 8, calibration=None, progress=False)
            assert not packed_layers(model)
    with pytest.raises(ValueError, match=f"'{name}' holds NaN or infinity"): model.save_pretrained(tmp_path/'m')
    assert not (tmp_path/'m').exists()

def test_a_file_without_a_tensor_and_a_config_of_nothing_are_named(tmp_path):
    from safetensors.torch import load_file
    from aquatic_nb.sources import Source, empty_model
    conditional().save_pretrained(tmp_path/'m')
    file, config = tmp_path/'m'/'diffusion_pytorch_model.safetensors', tmp_path/'m'/'config.json'
    state = load_file(file)
    state.pop('conv_in.weight')
    save_file(state, file)
    with pytest.raises(ValueError, match="'conv_in.weight' of UNet2DConditionModel is in none of its weight files"): load_quantized(tmp_path/'m')
    for broken in ('7', '"x"'):
        config.write_text(json.dumps(json.loads(config.read_text()) | dict(norm_num_groups=json.loads(broken))))
        with pytest.raises(ValueError, match='config.json.*no UNet2DConditionModel can be built.*get the file again'): empty_model(Source(tmp_path/'m'))
