"Uniform peers: grids, error feedback, and layers that are trained straight through."
import copy

import aquatic_nb # noqa: F401  first: torchvision may lack its operators
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from aquatic_nb.act import attach_act
from aquatic_nb.core import generator
from aquatic_nb.eval.uniform import UniformTuned, gptq, quantize_uniform, round_to_nearest, straight_through
from aquatic_nb.kaq import packable
from aquatic_nb.tune.layers import ROLES, close_layers, opened_layers
from ldm4_worker import tiny_pipe


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 8), st.integers(1, 70), st.sampled_from([0, 16, 64]), st.booleans())
def test_rounding_uses_few_levels_and_stays_within_half_a_step(seed, bits, n, group_size, clip):
    W = torch.randn(3, n, generator=generator(seed, 'W'))
    Q = round_to_nearest(W, bits, group_size, clip)
    g = group_size or n
    assert Q.shape == W.shape
    for a in range(0, n, g):
        part, rounded = W[:, a:a + g], Q[:, a:a + g]
        assert all(len(row.unique()) <= 2**bits for row in rounded)
        step = (part.amax(1) - part.amin(1))/(2**bits - 1)
        if not clip: assert ((part - rounded).abs().amax(1) <= step/2 + 1e-5*part.abs().amax()).all()
        elif part.shape[1] == g: assert (part - rounded).square().sum() <= (part - round_to_nearest(part, bits, 0)).square().sum()*(1 + 1e-5)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 5))
def test_error_feedback_is_rounding_where_inputs_are_white_and_better_where_they_are_not(seed, bits):
    g = generator(seed, 'gptq')
    W, X = torch.randn(16, 64, generator=g), torch.randn(300, 8, generator=g) @ torch.randn(8, 64, generator=g) + .1*torch.randn(300, 64, generator=g)
    torch.testing.assert_close(gptq(W, torch.eye(64), bits), round_to_nearest(W, bits), rtol=1e-5, atol=1e-5)
    H = X.T @ X/300
    damage = lambda Q: (((W - Q) @ H)*(W - Q)).sum().item()
    assert damage(gptq(W, H, bits)) < damage(round_to_nearest(W, bits))


def test_bits_are_those_of_packed_integers_and_two_halves_a_group():
    unet = tiny_pipe().unet
    model, stored = quantize_uniform(unet, 3, 16)
    layers = packable(unet)
    assert stored.keys() == layers.keys()
    for n, m in layers.items():
        O, N = len(m.weight), m.weight[0].numel()
        assert stored[n] == O*N*(8 if n in ('conv_in', 'conv_out') else 3) + 32*O*-(-N//16), n
        same = UniformTuned(copy.deepcopy(m), 8 if n in ('conv_in', 'conv_out') else 3, 16)
        assert same.stored_bits == stored[n] or N < 16 # a group is no longer than a row
    assert all(torch.equal(a, b) for a, b in zip(unet.state_dict().values(), tiny_pipe().unet.state_dict().values())) # left alone
    assert not torch.equal(model.conv_in.weight, unet.conv_in.weight)


@pytest.mark.parametrize('layer', [nn.Linear(50, 6), nn.Conv2d(3, 5, 3), nn.Conv2d(4, 4, 1, bias=False)])
def test_gradients_pass_the_rounding(layer):
    "As if it were not there inside the range, and into scales and zero points as the formula says."
    peer = UniformTuned(copy.deepcopy(layer), 4, 16)
    weight = peer.quantized()
    G = torch.randn(weight.shape, generator=generator(0, 'G'))
    (weight*G).sum().backward()
    torch.testing.assert_close(peer.dense.weight.grad, G) # min-max: nothing is cut off
    s, z = peer.group_scale.detach(), peer.zero.detach()
    assert torch.isfinite(peer.group_scale.grad).all() and peer.zero.grad.abs().max() < 1e-4*G.abs().max()*s.max() # a zero point inside the range moves nothing
    cut = UniformTuned(copy.deepcopy(layer), 4, 16)
    cut.zero.data = z + 1.
    (cut.quantized()*G).sum().backward()
    assert cut.zero.grad.abs().max() > .1*s.min() and (cut.dense.weight.grad == 0).any() # some weights are beyond the last level


def test_a_peer_is_opened_trained_and_closed_with_its_activations():
    pipe = tiny_pipe()
    model = straight_through(copy.deepcopy(pipe.unet), 4)
    layers = opened_layers(model)
    assert layers.keys() == packable(pipe.unet).keys() and layers['conv_in'].bits == 8
    g = generator(0, 'call')
    call = dict(sample=torch.randn(2, 4, 4, 4, generator=g), timestep=torch.tensor([500, 500]), encoder_hidden_states=torch.randn(2, 1, 16, generator=g))
    with torch.no_grad(): attach_act(model, 8, [call], layers={n: m for n, m in layers.items() if n != 'conv_in'})
    assert layers['conv_in'].act is None and layers['conv_out'].act is not None
    for n, m in layers.items():
        roles, own = m.roles(), dict(m.named_parameters())
        assert set(roles) <= set(ROLES) and ('act' in roles) == (n != 'conv_in')
        assert {k: id(p) for found in roles.values() for k, p in found.items()} == {k: id(p) for k, p in own.items()} # each parameter has one role
    with torch.no_grad():
        before = model(**call).sample
        close_layers(model)
        assert not opened_layers(model)
        torch.testing.assert_close(model(**call).sample, before, rtol=1e-4, atol=1e-5)
