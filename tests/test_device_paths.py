"""Every path that touches a device, on a device that is only pretended (see device_check): nothing mixes devices, and the host waits where it must.

`waits` counts what stops the host until the device is done. A loop that waits once a round is a fault even where the result is right.
"""
import copy

import pytest
import torch
from cuda_cases import random_layer, reference
from cuda_emulator import Emulator, can_emulate
from device_check import DeviceError, OnDevice, pretend
from diffusers import ConfigMixin, DDIMScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from aquatic_nb import cuda, layers
from aquatic_nb.act import ActQuant, act_layers, attach_act
from aquatic_nb.aq import Scheme, residual_kmeans
from aquatic_nb.calib import calibration_batches, input_moments
from aquatic_nb.core import Run
from aquatic_nb.encode import (encode_rows, nearest_plane, refit_codebooks, refit_scales, relative_error, share_codebooks, start,
                               sweep_codes, to_aq)
from aquatic_nb.kaq import natural_group_size, packable
from aquatic_nb.layers import packed_layers, pick_kernel, set_kernel, swap
from aquatic_nb.pack import quant_report
from aquatic_nb.quant import quantize_unet
from aquatic_nb.semi_pv import SeMIPV, param_groups
from aquatic_nb.tune.distill import Teacher, TuneConfig, distill, distillation_loss, iid_batch
from aquatic_nb.tune.layers import close_layers, open_layers, opened_layers
from aquatic_nb.walk import as_calls, record_walk, steps_of

QUIET = Run(progress=False)


class Tiny(ModelMixin, ConfigMixin):
    "A denoiser of five layers, called as diffusers calls its own."
    @register_to_config
    def __init__(self, in_channels=3, sample_size=8, cross_attention_dim=16, width=8, depth=1):
        super().__init__()
        self.conv_in, self.time = nn.Conv2d(in_channels, width, 3, padding=1), nn.Linear(cross_attention_dim, width)
        self.middle = nn.ModuleList([nn.Conv2d(width, width, 3, padding=1) for _ in range(depth)])
        self.proj, self.conv_out = nn.Conv2d(width, width, 1), nn.Conv2d(width, in_channels, 3, padding=1)

    def forward(self, sample, timestep, encoder_hidden_states, return_dict=True):
        t = torch.as_tensor(timestep, device=sample.device).reshape(-1, 1).expand(len(sample), -1).to(sample.dtype)
        x = self.conv_in(sample) + (self.time(encoder_hidden_states.mean(1)) + torch.sin(t/100))[..., None, None]
        for layer in self.middle: x = x + layer(torch.nn.functional.silu(x))
        return (self.conv_out(self.proj(x)),)


def tiny(depth=1):
    torch.manual_seed(0)
    return Tiny(depth=depth).eval()


def packed(depth=1, dtype=torch.float32):
    "The same with random codes."
    g, model = torch.Generator().manual_seed(0), tiny(depth).to(dtype)
    for name, m in packable(model).items():
        kind = 'linear' if isinstance(m, nn.Linear) else 'conv3x3' if m.kernel_size == (3, 3) else 'conv1x1'
        scheme = Scheme(2, 5, natural_group_size(m.weight.shape))
        swap(model, name, random_layer(kind, scheme, m.weight.shape[0], m.weight.shape[1], g, dtype=dtype))
    return model


def call(model, n=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    p = next(model.parameters())
    draw = lambda *shape: torch.randn(*shape, generator=g).to(p.device, packed_dtype(model))
    return dict(sample=draw(n, 3, 8, 8), timestep=(torch.arange(n)*200 + 50).to(p.device), encoder_hidden_states=draw(n, 1, 16))


def packed_dtype(model): return next((m.compute_dtype for m in packed_layers(model).values()), next(model.parameters()).dtype)


def problem(O=12, N=48, seed=0):
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(300, N, generator=g) @ torch.randn(N, N, generator=g)
    return torch.randn(O, N, generator=g), X.T @ X/300, .1*torch.randn(N, N, generator=g)


def waits_of(stage):
    with pretend() as device: stage()
    return device


@pytest.fixture
def pretended_gpu(monkeypatch):
    "The CUDA kernels' device: the emulator; and tensors on the pretended device count as plain ones."
    if not can_emulate: pytest.skip('the emulator needs Linux and g++')
    backend = Emulator()
    monkeypatch.setattr(layers, 'why_not_plain', lambda layer, x: None)
    monkeypatch.setattr(cuda, '_capability', lambda index: (9, 0))
    monkeypatch.setattr(cuda, 'gpu', lambda index: backend)
    return backend


@pytest.fixture(autouse=True)
def no_gpu(request, monkeypatch):
    "Without the fixture above, the CUDA kernels refuse."
    if 'pretended_gpu' not in request.fixturenames: monkeypatch.setattr(cuda, '_capability', lambda index: (0, 0))


# ---------------------------------------------------------------- the check finds what it is for

@pytest.mark.parametrize('fault', [
    lambda x: x + torch.ones(3), lambda x: torch.ones(3).mul_(x[0]), lambda x: torch.cat([x, torch.ones(1, 3)]), lambda x: x @ torch.ones(3, 3),
    lambda x: torch.ones(4)[torch.tensor([1], device='cuda')], lambda x: torch.zeros(()).add_(x.sum()), lambda x: x.cpu() + x,
    lambda x: torch.where(x > 0, torch.ones(4, 3), x), lambda x: nn.Linear(3, 2)(x), lambda x: nn.Linear(3, 2).to('cuda')(x.cpu()),
    lambda x: torch.randn(3, device='cuda', generator=torch.Generator()), lambda x: x.normal_(generator=torch.Generator())], ids=range(12))
def test_two_devices_are_refused(fault):
    with pretend():
        with pytest.raises(DeviceError, match='tensors on two devices|generator of the CPU'): fault(torch.randn(4, 3).to('cuda'))


def test_a_tensor_on_the_device_is_no_array():
    with pretend():
        x = torch.ones(3, device='cuda')
        for f in (x.numpy, lambda: x.float().detach().numpy(), lambda: x.__array__()):
            with pytest.raises(TypeError, match='cuda:0'): f()
        assert x.cpu().numpy().sum() == 3


@pytest.mark.parametrize('kind,stage', [
    ('item', lambda x: x.sum().item()), ('item', lambda x: bool((x > 0).any())), ('item', lambda x: x.tolist()), ('item', lambda x: f'{float(x[0, 0])}'),
    ('to host', lambda x: x.cpu()), ('to host', lambda x: x.to('cpu', torch.float64)), ('to host', lambda x: torch.zeros(4, 3).copy_(x)),
    ('to device', lambda x: torch.ones(3).to(x.device)), ('to device', lambda x: torch.tensor([1.], device=x.device)), ('to device', lambda x: x[torch.tensor([0, 2])]),
    ('size', lambda x: x[x > 0]), ('size', lambda x: (x > 0).nonzero()), ('size', lambda x: x.unique()), ('size', lambda x: torch.bincount((x[:, 0] > 0).int())),
    ('check', lambda x: torch.linalg.inv(x[:3])), ('check', lambda x: torch.equal(x, x))], ids=lambda o: o if isinstance(o, str) else '')
def test_waiting_is_counted(kind, stage):
    with pretend() as device:
        x = torch.randn(4, 3).to('cuda')
        device.counts.clear()
        stage(x)
    assert device.counts == {kind: 1}


def test_what_stays_on_the_device_waits_for_nothing():
    with pretend() as device:
        x, layer = torch.randn(4, 3).to('cuda').requires_grad_(), nn.Linear(3, 3).to('cuda')
        device.counts.clear()
        y = layer(x)*2 + torch.arange(3, device=x.device)
        y.square().mean().backward()
        y.detach().masked_fill_(y > 0, 0.)[:, 1:].add_(1)
        z = y.detach().clone(); z[z > 1] = 0.
        assert all(isinstance(t, OnDevice) and t.is_cuda and t.device.type == 'cuda' for t in (y, x.grad, layer.weight.grad, z, copy.deepcopy(layer).weight))
        assert not device.counts
        layer.cpu()
        assert not layer.weight.is_cuda and isinstance(layer.weight, nn.Parameter)


def test_it_computes_what_the_cpu_computes():
    g = torch.Generator().manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.SiLU()), torch.randn(2, 3, 8, 8, generator=g)
    want = model(x); want.sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    with pretend():
        there = copy.deepcopy(model).to('cuda'); there.zero_grad()
        got = there(x.to('cuda')); got.sum().backward()
        assert torch.equal(got.cpu(), want) and all(torch.equal(p.grad.cpu(), a) for p, a in zip(there.parameters(), grads))


# ---------------------------------------------------------------- the encoder

@pytest.mark.parametrize('scheme', [Scheme(2, 4, 8), Scheme(1, 5, 9), Scheme(2, 4, 8, 'fp16'), Scheme(1, 4, 1, kind='uniform')], ids=str)
def test_encoding_stays_on_the_device(scheme):
    W, H, D = problem()
    options = dict(beam=2, sweeps=1, seed=0)
    near = relative_error(W, encode_rows(W, H, scheme, D=D, **options).What[:, :48], H)
    with pretend():
        st = encode_rows(W.to('cuda'), H.to('cuda'), scheme, D=D.to('cuda'), **options)
        assert all(getattr(st, n).is_cuda for n in ('codes', 'C', 'scales', 'What'))
        aq = to_aq(st, tuple(W.shape))
        assert all(t.is_cuda for t in (aq.codes, aq.codebooks, aq.scales))
        there = relative_error(W.to('cuda'), st.What[:, :48], H.to('cuda'))
    stored = [step for step, _ in st.trace].index('storage')
    losses = [loss for _, loss in st.trace[:stored]]
    assert abs(there/near - 1) < .1 and all(b <= a*(1 + 1e-3) for a, b in zip(losses, losses[1:]))


def test_shared_codebooks_stay_on_the_device():
    with pretend():
        there = [tuple(t.to('cuda') for t in problem(seed=s)[:2]) for s in range(2)]
        C = share_codebooks([(W, H, 1.) for W, H in there], Scheme(2, 4, 8, share='set'), beam=1, sweeps=1)
        st = encode_rows(*there[0], Scheme(2, 4, 8), beam=1, sweeps=1, codebooks=C)
        assert C.is_cuda and st.codes.is_cuda


def begun(N, scheme=Scheme(2, 4, 8)):
    W, H, _ = problem(N=N)
    return start(W.to('cuda'), (H + torch.eye(N)).to('cuda'), scheme)


def waits_in(half_step, N=48):
    "Waits of one half-step of the encoder."
    with pretend() as device:
        st = begun(N); device.counts.clear(); device.places.clear()
        half_step(st)
    return device.waits


@pytest.mark.parametrize('half_step', [sweep_codes, refit_scales, nearest_plane])
def test_half_steps_do_not_wait_for_each_group(half_step):
    assert waits_in(half_step) == waits_in(half_step, N=192) <= 5                          # their loss, and checks of a solver


def test_conjugate_gradients_do_not_wait_in_each_iteration():
    few, many = (waits_in(lambda st: refit_codebooks(st, iters=n, enough=0.)) for n in (1, 4))
    assert many == few


def test_kmeans_does_not_wait_in_each_iteration():
    few, many = (waits_of(lambda: residual_kmeans(torch.randn(200, 8).to('cuda'), Scheme(1, 4, 8), iters=n)).waits for n in (1, 4))
    assert many == few


# ---------------------------------------------------------------- calibration

def walked(model, gen, guidance_scale=1.5, n=4):
    "A walk of four steps with random conditions."
    cond, null = (dict(encoder_hidden_states=torch.randn(n, 1, 16, generator=gen).to('cuda')) for _ in range(2))
    noise = torch.randn(n, 3, 8, 8, generator=gen)
    return record_walk(model, steps_of(DDIMScheduler(), n, 4, gen), noise, cond, null, guidance_scale, run=QUIET)


def test_walks_stay_on_the_device():
    with pretend() as device:
        model, gen = tiny().to('cuda'), torch.Generator().manual_seed(0)
        device.counts.clear(); device.places.clear()
        calls = walked(model, gen)
        assert all(v.is_cuda for c in calls for v in c.values()) and all(c.out.is_cuda for c in calls)
        assert device.waits == 0, device.told()
        assert all(v.is_cuda for c in calibration_batches(model, 'auto', n=4, steps=2) for v in c.values())


def moments_there(n):
    "Waits of `input_moments` over n batches, and what it found."
    with pretend() as device:
        model = tiny().to('cuda')
        batches, names = as_calls(model, [call(model, seed=i) for i in range(n)]), list(packable(model)) # tried once a form
        device.counts.clear(); device.places.clear()
        found = input_moments(model, batches, names, reference=copy.deepcopy(model), workers=1)
        waits = device.waits
        assert all(m.H.is_cuda and m.D.is_cuda for m in found.values())
        return waits, {k: m.H.cpu() for k, m in found.items()}


def test_moments_stay_on_the_device():
    waits, found = moments_there(2)
    model = tiny()
    want = input_moments(model, [call(model, seed=i) for i in range(2)], list(packable(model)), reference=copy.deepcopy(model), workers=1)
    assert waits == 0 and all(torch.allclose(found[k], m.H, rtol=1e-4, atol=1e-5) for k, m in want.items())


def test_sampled_moments_do_not_wait_for_each_layer():
    assert moments_there(20)[0] == 0                         # 4,096 rows a layer over 20 batches of 256: drawn


# ---------------------------------------------------------------- packed layers

@pytest.mark.parametrize('bits', [None, 8], ids=['A16', 'A8'])
def test_packed_layers_wait_for_nothing(bits):
    model = packed()
    set_kernel(model, 'dense')
    if bits: attach_act(model, bits, [call(model, seed=i) for i in range(2)])
    want = model(**call(model))[0]
    with pretend() as device:
        model.to('cuda'); inputs = call(model)
        device.counts.clear()
        with torch.no_grad(): got = model(**inputs)[0]
        assert not device.counts and got.is_cuda
        assert ((got.cpu() - want).square().mean().sqrt()/want.square().mean().sqrt()) < 1e-2
        model.cpu()
        assert not any(p.is_cuda for p in model.parameters())


@pytest.mark.parametrize('bits', [None, 8], ids=['A16', 'A8'])
def test_the_cuda_kernels_are_taken_and_wait_for_nothing(bits, pretended_gpu):
    model = packed(dtype=torch.float16)
    set_kernel(model, 'dense')
    if bits: attach_act(model, bits, [call(model, seed=i) for i in range(2)])
    set_kernel(model, 'auto')
    with pretend() as device:
        model.to('cuda'); inputs = call(model)
        device.counts.clear()
        with torch.no_grad(): got = model(**inputs)[0]
        assert device.waits == 0 and got.is_cuda
        set_kernel(model, 'dense')
        with torch.no_grad(): want = model(**inputs)[0]
        assert (got - want).float().square().mean().sqrt() < 1e-2*want.float().square().mean().sqrt()
    assert {p.kernel for p in pretended_gpu._loaded} >= {'aq_conv', 'aq_gemm'}


@pytest.mark.parametrize('name', ['cuda', 'cuda_fused', 'cuda_scratch'])
def test_each_cuda_kernel_by_name(name, pretended_gpu):
    layer = random_layer('linear', Scheme(2, 8, 8), 24, 64, torch.Generator().manual_seed(0))
    x = torch.randn(3, 64).half()
    want = reference(layer, x)
    with pretend() as device:
        there, layer.kernel = x.to('cuda'), name
        layer.to('cuda')
        assert pick_kernel(layer, there)[0].name == name
        device.counts.clear()
        with torch.no_grad(): got = layer(there)
        assert device.waits == 0
        assert ((got.cpu().double() - want).abs().max()/want.abs().max()) < 2e-3
        assert 'cpu' in pick_kernel(layer.to('cpu'), x)[1]['cuda'] and 'input on cpu' in cuda.why_not_call(layer.to('cuda'), x)


def test_activation_ranges_are_found_on_the_device():
    model = packed()
    set_kernel(model, 'dense')
    attach_act(model, 8, [call(model, seed=i) for i in range(2)])
    want = {n: a.scale for n, a in act_layers(model).items()}
    with pretend():
        model = packed().to('cuda')
        attach_act(model, 8, [call(model, seed=i) for i in range(2)])
        found = act_layers(model)
        assert all(a.scale.is_cuda and a.timesteps.is_cuda for a in found.values())
        assert all(torch.allclose(a.scale.cpu(), want[n], rtol=.2) for n, a in found.items())


def test_watching_inputs_does_not_wait_for_each_bucket():
    def watched(times):
        model = packed().to('cuda')
        batches = [call(model) | dict(timestep=torch.tensor(times).to('cuda'))]
        attach_act(model, 8, batches)
    assert waits_of(lambda: watched([10, 10, 10, 10])).waits == waits_of(lambda: watched([10, 300, 600, 900])).waits


# ---------------------------------------------------------------- tuning

def tuned(steps, depth=1, selector=None, code_every=100, **options):
    "Waits of some steps of SeMI-PV on the device."
    with pretend() as device:
        model = packed(depth).to('cuda')
        open_layers(model)
        groups = param_groups(model, code_lr=3., code_betas=(0., .95), **options)        # far, and no memory: codes may jump at once
        optimizer = SeMIPV(groups, opened_layers(model), selector, code_every=code_every, clear=0., code_fraction=.1)
        inputs = call(model)
        device.counts.clear(); device.places.clear()
        for _ in range(steps):
            optimizer.zero_grad()
            model(**inputs)[0].square().mean().backward()
            optimizer.step()
        seen = device.waits, device.told(), optimizer.moved
        assert all(t.is_cuda for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t))
        close_layers(model)
        assert all(p.is_cuda for p in model.parameters())
    return seen


@pytest.mark.parametrize('selector', [None, 'A', 'B', 'C'])
def test_semi_pv_stays_on_the_device(selector): assert tuned(2, selector=selector, code_every=1)[2]['additive'] > 0


def test_a_continuous_step_does_not_wait_for_each_layer():
    assert tuned(1, depth=1)[0] == tuned(1, depth=3)[0]


def test_a_code_step_waits_once_a_layer_at_most():
    waits, where, _ = tuned(1, code_every=1)
    assert waits <= 5 + 5, where                                                          # five layers; five for their promises, see above


def pupils():
    "A student, and two teachers, on the device."
    dense = tiny().to('cuda')
    return packed().to('cuda'), *(Teacher(lambda i, gen: walked(dense, gen), dense, n_walks=2, seed=seed) for seed in (0, 1))


def test_the_distillation_loss_waits_for_nothing():
    with pretend() as device:
        student, teacher, _ = pupils()
        open_layers(student)
        batch = iid_batch(teacher, 0, 4, 0)
        device.counts.clear(); device.places.clear()
        distillation_loss(student, batch).backward()
        assert device.waits == 0, device.told()


@pytest.mark.parametrize('mode,selector', [('iid', None), ('walk', 'A')])
def test_distillation_stays_on_the_device(mode, selector):
    with pretend():
        student, teacher, held = pupils()
        config = TuneConfig(steps=2, batch=4, mode=mode, selector=selector, code_lr=.3, code_every=1, held_every=1, bf16=False)
        log = distill(student, teacher, config, held=held, run=QUIET)
        assert all(p.is_cuda for p in student.parameters()) and len(packed_layers(student)) == 5
        assert log[-1]['held'] == log[-1]['held'] and log[-1]['start'] > 0


# ---------------------------------------------------------------- from end to end

def quantized_there(place, laq=False):
    "A model from the host, quantized on the device with inputs that are at `place`, and what was seen."
    model, schemes = tiny(), {'middle.*': (2, 4), 'proj': (1, 4)}                          # small codebooks: seconds
    with pretend() as device:
        inputs = [{k: v.to(place) for k, v in call(model, seed=i).items()} for i in range(2)]
        quantize_unet(model, 8, overrides=schemes, device='cuda', calibration=inputs, beam=1, sweeps=1, laq=laq, act_bits=8, progress=False)
    return model, device


@pytest.mark.parametrize('laq', [False, pytest.param(True, marks=pytest.mark.slow)], ids=['uniform', 'laq'])
def test_quantizing_on_the_device_and_back(laq):
    model, device = quantized_there('cuda', laq)
    assert device.counts['to device'] and not any(t.is_cuda for t in (*model.parameters(), *model.buffers()))
    assert all(isinstance(a, ActQuant) for a in act_layers(model).values()) and quant_report(model).attrs['bits'] <= 8
    set_kernel(model, 'dense')
    assert model(**call(model))[0].isfinite().all()


def test_calibration_inputs_follow_the_model(): quantized_there('cpu')
