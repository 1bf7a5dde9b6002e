"CPU kernels against float64, over generated shapes, on both instruction paths."
import copy
import math
import pickle
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from aquatic_nb import cpu
from aquatic_nb.act import ActQuant
from aquatic_nb.aq import AQTensor, Scheme, sum_codewords
from aquatic_nb.kaq import to_groups
from aquatic_nb.kernels import decode, gemm, simd, winograd
from aquatic_nb.layers import from_aq, pick_kernel

@pytest.fixture(autouse=True)
def by_rule(monkeypatch):
    "Kernels are asked for by name here; test_dispatch.py looks at the clock."
    monkeypatch.setenv('AQUATIC_MEASURE', '0')


KINDS = ('conv3x3', 'conv1x1', 'linear', 'stride2', 'grouped', 'circular')
TOLERANCE = {'wino4': 1e-3, 'wino2': 1e-4}    # of the output's scale; the others 1e-4 / 10


def make(kind, O, I, M, B, seed=0, int8=True, bias=True):
    "A packed layer with random codes."
    g = torch.Generator().manual_seed(seed)
    dense = {'conv3x3': lambda: nn.Conv2d(I, O, 3, padding=1, bias=bias), 'conv1x1': lambda: nn.Conv2d(I, O, 1, bias=bias),
             'linear': lambda: nn.Linear(I, O, bias=bias), 'stride2': lambda: nn.Conv2d(I, O, 3, stride=2, padding=1, bias=bias),
             'grouped': lambda: nn.Conv2d(2*I, 2*O, 3, padding=1, groups=2, bias=bias),
             'circular': lambda: nn.Conv2d(I, O, 3, padding=1, padding_mode='circular', bias=bias)}[kind]()
    if bias: dense.bias.data = (torch.rand(dense.bias.shape, generator=g) - .5)/dense.weight[0].numel()**.5
    scheme = Scheme(M, B, 8 if kind in ('conv1x1', 'linear') else 9, 'int8' if int8 else 'fp16')
    J = to_groups(dense.weight.detach(), scheme.group_size).shape[1]
    codes = torch.randint(0, 2**B, (len(dense.weight), J, M), generator=g).short()
    reach = 127//M
    books = torch.randint(-reach, reach + 1, (M, 2**B, scheme.group_size), generator=g)
    books = books.to(torch.int8) if int8 else (books/reach).half()
    scales = ((torch.rand(len(dense.weight), generator=g) + .5)/reach/math.sqrt(dense.weight[0].numel())).half()
    return from_aq(dense, AQTensor(codes, books, scales, dense.weight.shape, scheme)).requires_grad_(False)


def ranges(layer, n, split, bits, seed):
    "An activation quantizer for `n` samples (one bucket, so n is 1) with random range."
    g = torch.Generator().manual_seed(seed)
    H = 1 if split is None else 2
    return ActQuant(bits, [0], torch.rand(1, H, generator=g)*4/2**bits + .5/2**bits, torch.randint(0, 2**bits, (1, H), generator=g).float(), split=split)


def reference(layer, x, size=False):
    "float64 throughout, activations quantized by the layer's own simulation; `size` gives the sums of absolute terms."
    aq = layer.aq
    w = sum_codewords(aq.codes, aq.codebooks.double()).flatten(1)[:, :math.prod(aq.shape[1:])]
    w = (w*aq.scales.double()[:, None]).reshape(aq.shape)
    bias = None if layer.bias is None else layer.bias.double()
    if layer.act is not None:
        q, s, z = layer.act.quantize(x)
        x = (q.double() - layer.act.spread(z, x).double())*layer.act.spread(s, x).double()
    x = x.double()
    if size: x, w, bias = x.abs(), w.abs(), None if bias is None else bias.abs()
    if layer.weight.dim() == 2: return F.linear(x, w, bias)
    if layer.padding_mode != 'zeros': return F.conv2d(F.pad(x, (1, 1, 1, 1), mode='circular'), w, bias)
    return F.conv2d(x, w, bias, layer.stride, layer.padding, layer.dilation, layer.groups)


def agree(layer, x, name=None):
    "The layer's output is the reference's, within the kernel's tolerance."
    if name: layer.kernel = name
    with torch.inference_mode():
        used = pick_kernel(layer, x)[0].name
        y = layer(x)
    if name: assert used == name
    ref = reference(layer, x)
    fan_in = math.prod(layer.weight_shape[1:])
    scale = max(float(reference(layer, x, size=True).max())/fan_in**.5, float(ref.std()) if ref.numel() > 1 else 0.)
    if layer.bias is not None: scale = max(scale, float(layer.bias.abs().max()))   # torch starts its sums from the bias: every addition rounds at its size
    err = float((y - ref).abs().max())/max(scale, 1e-30)                            # all inputs may be the zero point
    assert y.shape == ref.shape and err <= TOLERANCE.get(used, 1e-5), (used, err, tuple(x.shape), layer)
    return y


@st.composite
def cases(draw):
    kind = draw(st.sampled_from(KINDS))
    O, I = draw(st.integers(1, 70)), draw(st.integers(1, 40))
    M = draw(st.integers(1, 4))
    B = draw(st.integers(4, 12))
    n, h, w = draw(st.integers(1, 3)), draw(st.integers(1, 21)), draw(st.integers(1, 37))
    if draw(st.booleans()) and kind in ('conv1x1', 'linear'): I = 8*((I + 7)//8)
    act = draw(st.booleans()) and kind in ('conv3x3', 'conv1x1', 'linear')
    split = draw(st.integers(1, I - 1)) if act and I > 1 and draw(st.booleans()) else None
    return dict(kind=kind, O=O, I=I, M=M, B=B, n=n, h=h, w=w, act=act, split=split, bits=draw(st.sampled_from((4, 8))),
                int8=draw(st.booleans()), bias=draw(st.booleans()), width=draw(st.sampled_from(list(simd.widths()))),
                layout=draw(st.sampled_from(('plain', 'channels_last', 'strided'))), seed=draw(st.integers(0, 9999)))


def check(c):
    layer = make(c['kind'], c['O'], c['I'], c['M'], c['B'], c['seed'], c['int8'], c['bias'])
    if c['act']: layer.act = ranges(layer, 1, c['split'], c['bits'], c['seed'])
    g = torch.Generator().manual_seed(c['seed'] + 1)
    if c['kind'] == 'linear': x = torch.randn(c['n'], c['h'], c['I'], generator=g)
    else:
        x = torch.randn(c['n'], c['I']*(2 if c['kind'] == 'grouped' else 1), max(c['h'], 2), max(c['w'], 2), generator=g)
        if c['kind'] == 'conv3x3' and c['seed'] % 7 == 0: x = x[:, :, :1, :1]
        if c['layout'] == 'channels_last': x = x.contiguous(memory_format=torch.channels_last)
    if c['layout'] == 'strided': x = torch.stack([x, x], -1)[..., 0]
    before = [p.clone() for p in layer.parameters()]
    with simd.use_width(c['width']):
        agree(layer, x)
        for name in ('decode', 'cached', 'bytes', 'wino2', 'wino4', 'gemm', 'few', 'int8', 'lut'):
            layer.kernel = name
            with torch.no_grad(): able = pick_kernel(layer, x)[0].name == name
            if able: agree(layer, x, name)
        layer.kernel = 'auto'
    assert all(torch.equal(a, b) for a, b in zip(before, layer.parameters()))


LOOSE = dict(deadline=None, suppress_health_check=list(HealthCheck))

@pytest.mark.timeout(1200)
@settings(max_examples=40, derandomize=True, **LOOSE)
@given(cases())
def test_shapes(c): check(c)


@pytest.mark.slow
@pytest.mark.timeout(14400)
@settings(max_examples=10000, **LOOSE)
@given(cases())
def test_many_shapes(c): check(c)


@pytest.mark.parametrize('kind,shape,names', [('conv3x3', (2, 20, 19, 33), ('wino4', 'wino2', 'bytes', 'decode', 'lut', 'int8')), ('conv1x1', (2, 24, 9, 7), ('gemm', 'bytes', 'decode', 'int8', 'lut')),
                                              ('linear', (30, 24), ('gemm', 'bytes', 'decode', 'int8', 'lut')), ('linear', (5, 24), ('few', 'bytes', 'gemm'))])
def test_threads_give_the_same_bits(kind, shape, names, monkeypatch):
    monkeypatch.setenv('AQUATIC_WEIGHT_CACHE', str(1 << 24)) # room to keep, whatever other layers there are
    layer = make(kind, 100, shape[1], 2, 9)
    x, before = torch.randn(shape, generator=torch.Generator().manual_seed(0)), torch.get_num_threads()
    try:
        for name in names:
            layer.act = ranges(layer, 1, None, 8, 0) if name == 'int8' else None
            layer.kernel, got = name, []
            if name == 'int8' and kind == 'linear' and not simd.use_simd(int8=True):
                assert '8-bit dot product' in pick_kernel(layer, x)[1]['int8'] # refused by name; the rest is not
                continue
            for t in (1, 2, 3, 2):
                torch.set_num_threads(t)
                with torch.inference_mode(): got.append(cpu_run(layer, x, name))
            assert all(torch.equal(got[0], g) for g in got[1:]), name
    finally: torch.set_num_threads(before)


def cpu_run(layer, x, name):
    if name == 'decode': return torch.from_numpy(decode.decode_dense(cpu.packed_of(layer), math.prod(layer.weight_shape[1:])))   # the dense product is torch's
    assert pick_kernel(layer, x)[0].name == name
    return layer(x)


@pytest.mark.parametrize('I,O', [(1, 1), (1, 7), (3, 40), (8, 5), (23, 33), (64, 96)])
@pytest.mark.parametrize('kind', ['conv3x3', 'linear'])
@pytest.mark.parametrize('threads', [1, 2, 3])
def test_decode_writes_its_rows_and_nothing_else(kind, I, O, threads):
    "Rows are written sixteen floats at a time, past their end: never past the end of what was asked for, nor into another thread's rows."
    layer, before = make(kind, O, I, 2, 9), torch.get_num_threads()
    N = math.prod(layer.weight_shape[1:])
    room = np.full(O*N + 64, 7., np.float32)
    try:
        torch.set_num_threads(threads)
        for _ in range(5): decode.decode_dense(cpu.packed_of(layer), N, room[32:32 + O*N].reshape(O, N))
    finally: torch.set_num_threads(before)
    assert (room[:32] == 7).all() and (room[-32:] == 7).all()
    np.testing.assert_allclose(room[32:-32], layer.weight.detach().numpy().ravel(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize('out', [np.empty((4, 9), np.float32), np.empty((5, 10), np.float32), np.empty((5, 9)), np.empty((9, 5), np.float32).T])
def test_decode_refuses_another_buffer(out):
    with pytest.raises(ValueError, match='contiguous float32'): decode.decode_dense(cpu.packed_of(make('conv3x3', 5, 1, 2, 9)), 9, out)


def test_two_python_threads_at_once():
    layers = [make('conv3x3', 48, 24, 2, 9, s) for s in range(2)] + [make('linear', 96, 64, 2, 8, s) for s in range(2)]
    xs = [torch.randn(2, 24, 16, 16)]*2 + [torch.randn(64, 64)]*2
    with torch.no_grad(): want = [m(x) for m, x in zip(layers, xs)]
    wrong = []
    def work(i):
        with torch.no_grad():
            for _ in range(50):
                if not torch.equal(layers[i](xs[i]), want[i]): wrong.append(i)
    ts = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in ts: t.start()
    for t in ts: t.join()
    assert not wrong


def test_caches_follow_the_layer():
    layer = make('conv3x3', 16, 8, 2, 9)
    x = torch.randn(2, 8, 16, 16)
    agree(layer, x, 'wino4')
    assert not any('cpu' in k for k in layer.state_dict())
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert id(other) not in cpu._views
        agree(other, x, 'wino4')
    with torch.no_grad():
        layer.codebooks.neg_(); layer.scales.mul_(2); layer.bias.add_(1)
    agree(layer, x, 'wino4')
    with torch.no_grad(): layer.codes.copy_(layer.codes.flip(0))
    agree(layer, x, 'wino4')
    layer.scales.data.mul_(2)                        # no version counts this
    cpu.forget(layer)
    agree(layer, x, 'wino4')
    agree(layer.half().float(), x, 'wino4')


def test_training_takes_the_differentiable_path():
    layer = make('conv3x3', 16, 8, 2, 9)
    x = torch.randn(1, 8, 16, 16, requires_grad=True)
    k, reasons = pick_kernel(layer, x)
    assert k.name == 'dense' and 'gradients' in reasons['wino4']
    layer(x).sum().backward()
    assert x.grad is not None


def test_timesteps_of_a_batch_may_differ():
    from aquatic_nb.act import at_timestep
    for kind, shape in (('conv3x3', (2, 8, 8, 8)), ('conv1x1', (2, 8, 8, 8)), ('linear', (2, 6, 8))):
        layer = make(kind, 16, 8, 2, 8)
        layer.act = ActQuant(8, [100, 900], torch.tensor([[.01], [.03]]), torch.tensor([[100.], [20.]]))
        with at_timestep(torch.tensor([0, 999])):
            for _ in range(2): agree(layer, torch.randn(shape))


def test_bad_input_is_an_error():
    low, books, scales = np.zeros((4, 3, 2), np.uint8), np.zeros((2, 256, 8), np.int8), np.ones(4)
    good = dict(low=low, high=None, bits=8, shape=(4, 3, 2), books=books, scales=scales)
    decode.Packed(**good)
    for change, error, text in ((dict(low=low.astype(np.int16)), TypeError, 'int16'), (dict(low=low[:2]), ValueError, 'bytes'), (dict(books=books[:, :100]), ValueError, 'codebooks'),
                                (dict(books=books.astype(np.int32)), TypeError, 'int32'), (dict(scales=scales[:2]), ValueError, 'scales'), (dict(bits=9), ValueError, 'codes_hi'),
                                (dict(high=np.zeros(3, np.uint8)), ValueError, 'codes_hi')):
        with pytest.raises(error, match=text): decode.Packed(**{**good, **change})
    p, x = decode.Packed(**good), np.zeros((5, 24), np.float32)
    for call, text in ((lambda: gemm.linear_gemm(p, x.astype(np.float64), np.zeros((5, 4), np.float32)), 'float32'), (lambda: gemm.linear_gemm(p, x[:, :16], np.zeros((5, 4), np.float32)), '24'),
                       (lambda: gemm.linear_gemm(p, x[:, ::-1], np.zeros((5, 4), np.float32)), 'contiguous'), (lambda: gemm.linear_gemm(p, x, np.zeros((5, 3), np.float32)), r'\(5, 4\)'),
                       (lambda: winograd.conv3x3_f4(p, np.zeros((1, 3, 4, 4), np.float32), np.zeros((1, 4, 4, 4), np.float32)), 'groups of 8')):
        with pytest.raises((ValueError, TypeError), match=text): call()
    odd = np.zeros(97, np.uint8)[1:].view(np.float32).reshape(1, 24)      # misaligned: read as it is, no fault
    assert (gemm.linear_gemm(p, odd, np.ones((1, 4), np.float32)) == 0).all()
