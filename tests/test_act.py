"Integer activations: semantics to the bit, the timestep of the call, threads, failures, the seams of skip connections."
import copy
import threading

import aquatic_nb.core # noqa: F401  first: diffusers imports torchvision
import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from aquatic_nb.act import ActQuant, act_layers, at_timestep, attach_act, bind_timestep, current_timestep, remove_act, search_range, skip_splits
from aquatic_nb.aq import AQTensor, Scheme
from aquatic_nb.kaq import packable
from aquatic_nb.layers import from_aq, packed_layers, swap, uniform_codebook


def integers(module):
    "A layer with 8-bit integer weights."
    w, scheme = module.weight.detach().flatten(1), Scheme(1, 8, 1, kind='uniform')
    s = (w.abs().amax(1)/127).clamp(min=1e-8).half()
    codes = ((w/s.float()[:, None]).round().clamp(-128, 127) + 128).short()[..., None]
    return from_aq(module, AQTensor(codes, uniform_codebook(scheme), s, module.weight.shape, scheme))


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    unet = UNet2DConditionModel(sample_size=4, in_channels=2, out_channels=2, down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D'),
                                up_block_types=('CrossAttnUpBlock2D', 'UpBlock2D'), block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
                                cross_attention_dim=16, attention_head_dim=1).eval().requires_grad_(False)
    for n, m in packable(unet).items(): swap(unet, n, integers(m))
    gen = torch.Generator().manual_seed(1)
    calls = [dict(sample=torch.randn(4, 2, 4, 4, generator=gen)*(1 + t/1000), timestep=torch.tensor(t), encoder_hidden_states=torch.randn(4, 1, 16, generator=gen)) for t in (900, 600, 300, 1)]
    return attach_act(unet, 8, calls), calls


@given(st.integers(2, 8), st.floats(1e-4, 1e3), st.integers(0, 255), st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20))
@settings(max_examples=200, deadline=None)
def test_integer_semantics(bits, scale, zero, values):
    zero = min(zero, 2**bits - 1)
    act = ActQuant(bits, [0], torch.tensor([[scale]]), torch.tensor([[float(zero)]]))
    x = torch.tensor([values + [0.]])
    q, s, z = act.quantize(x)
    import numpy as np
    want = np.clip(np.rint(x.numpy()/np.float32(scale)) + np.float32(zero), 0, 2**bits - 1).astype(np.uint8)
    assert (q.numpy() == want).all()
    assert torch.equal(act(x), (q.float() - z)*s)
    assert act(x)[0, -1] == 0                                    # zero is exact


@pytest.mark.parametrize('padding_mode', ['zeros', 'circular'])
def test_simulation_is_what_an_integer_convolution_computes(padding_mode):
    torch.manual_seed(0)
    layer = integers(nn.Conv2d(6, 5, 3, padding=1, padding_mode=padding_mode))
    scale, zero = torch.tensor([[.02, .05]]), torch.tensor([[100., 30.]])
    layer.act = ActQuant(8, [0], scale, zero, split=4)
    x = torch.randn(2, 6, 7, 7)
    q, s, z = layer.act.quantize(x)
    spread = lambda t: torch.cat([t[:, :1].expand(-1, 4), t[:, 1:].expand(-1, 2)], 1)[..., None, None]
    centred = q.to(torch.int64) - spread(z).long()
    pad = F.pad(centred.double(), (1, 1, 1, 1), mode='constant' if padding_mode == 'zeros' else padding_mode)    # q = z is a real zero
    weight = (layer.aq.codes.long()[..., 0] - 128).reshape(5, 6, 3, 3)
    halves = [F.conv2d(pad[:, a:b], weight[:, a:b].double())*s[0, h].double() for h, (a, b) in enumerate(((0, 4), (4, 6)))]
    want = sum(halves)*layer.scales.double().view(1, -1, 1, 1) + layer.bias.double().view(1, -1, 1, 1)
    torch.testing.assert_close(layer(x).double(), want, rtol=1e-5, atol=1e-5)


def test_a_range_of_zero_is_named_and_computes():
    "Inputs that are always zero: a warning that names the layer; zero at one timestep only: the neighbour's range."
    torch.manual_seed(0)
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.dead, self.live = integers(nn.Linear(4, 3)), integers(nn.Linear(4, 3))
        def forward(self, x, timestep): return self.dead(0*x) + self.live(x*(timestep > 500))
    net = Net()
    calls = [dict(x=torch.randn(5, 4), timestep=torch.tensor(t)) for t in (900, 10)]
    with pytest.warns(UserWarning, match="'dead': its calibration inputs are all zero"): attach_act(net, 8, calls)
    assert (net.dead.act.scale == torch.tensor(1/255)).all()
    assert net.live.act.scale[0] == net.live.act.scale[1] > 0
    for call in calls:
        want = net.dead.bias + F.linear(call['x']*(call['timestep'] > 500), net.live.weight, net.live.bias)
        assert torch.allclose(net(**call), want, atol=.05)


def test_nothing_is_counted(model):
    unet, calls = model
    with torch.no_grad():
        want = [unet(**c).sample for c in calls]
        for c in reversed(calls): unet(**c)                      # extra calls, another order
        got = [unet(**c).sample for c in reversed(calls)][::-1]
    assert all(torch.equal(a, b) for a, b in zip(want, got))


def test_timestep_forms(model):
    unet, calls = model
    c = calls[1]
    with torch.no_grad():
        want = unet(**c).sample
        for t in (600, 600., torch.tensor(600), torch.tensor([600]), torch.full((4,), 600)):
            assert torch.allclose(unet(c['sample'], t, c['encoder_hidden_states']).sample, want, atol=1e-5)
            assert torch.allclose(unet(c['sample'], timestep=t, encoder_hidden_states=c['encoder_hidden_states']).sample, want, atol=1e-5)


def test_mixed_timesteps_in_one_layer(model):
    unet, _ = model
    act = unet.conv_in.act
    x = torch.randn(4, 2, 4, 4)
    times = torch.tensor([880., 1., 310., 999.])
    with at_timestep(times): together = act(x)
    for i, t in enumerate(times):
        with at_timestep(t): assert torch.equal(act(x[i:i+1]), together[i:i+1])
    with at_timestep(times), pytest.raises(ValueError, match='4 timesteps for an input of 3'): act(x[:3])


def test_failed_calls_leave_nothing_behind(model):
    unet, calls = model
    with pytest.raises(Exception): unet(**dict(calls[0], sample=torch.randn(4, 3, 4, 4)))
    assert current_timestep() is None
    with pytest.raises(ValueError, match='this call has none'): unet.conv_in(calls[0]['sample'])


def test_threads_do_not_disturb_each_other(model):
    unet, calls = model
    with torch.no_grad(): want = [unet(**c).sample for c in calls]
    wrong, gate = [], threading.Barrier(len(calls))
    def job(i):
        gate.wait()
        for _ in range(5):
            with torch.no_grad():
                if not torch.allclose(unet(**calls[i]).sample, want[i], atol=1e-5): wrong.append(i)
    threads = [threading.Thread(target=job, args=(i,)) for i in range(len(calls))]
    for t in threads: t.start()
    for t in threads: t.join()
    assert not wrong


def test_copies_and_casts_keep_their_ranges(model):
    unet, calls = model
    twin = copy.deepcopy(unet)
    with torch.no_grad(): assert torch.equal(twin(**calls[0]).sample, unet(**calls[0]).sample)
    twin.half()
    for a, b in zip(act_layers(unet).values(), act_layers(twin).values()): assert b.scale.dtype == torch.float32 and torch.equal(a.scale, b.scale)
    remove_act(twin)
    assert not act_layers(twin) and act_layers(unet)
    again = copy.deepcopy(unet)
    bind_timestep(again)
    assert len(again._forward_pre_hooks) == 1
    state = unet.state_dict()
    assert {'conv_in.act.timesteps', 'conv_in.act.scale', 'conv_in.act.zero'} <= set(state)


def test_seams_of_skip_connections(model):
    unet, _ = model
    splits = skip_splits(unet)
    assert splits and set(splits) == {n for n in packed_layers(unet) if n.startswith('up_blocks') and n.endswith(('resnets.0.conv1', 'resnets.0.conv_shortcut', 'resnets.1.conv1', 'resnets.1.conv_shortcut'))}
    for n, c in splits.items(): assert unet.get_submodule(n).act.split == c and unet.get_submodule(n).act.scale.shape[1] == 2


@given(st.integers(2, 8), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_search_is_never_worse_than_min_max(bits, seed):
    gen = torch.Generator().manual_seed(seed)
    v = torch.randn(300, generator=gen)**3
    lo, hi = v.min().item(), v.max().item()
    scale, zero, error = search_range(v, torch.ones_like(v), bits, lo, hi)
    step = (max(hi, 0) - min(lo, 0))/(2**bits - 1)
    z = round(-min(lo, 0)/step)
    plain = (((v/step).round() + z).clamp(0, 2**bits - 1) - z)*step
    assert 0 <= zero <= 2**bits - 1 and error <= (plain - v).square().mean().item()*1.0001 + 1e-12
