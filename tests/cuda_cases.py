"""Random packed layers and what they should compute: for the tests of the CUDA kernels, for their notebook, and for `make gpu`."""
import torch
import torch.nn.functional as F
from torch import nn

from aquatic_nb.aq import AQTensor, Scheme
from aquatic_nb.core import generator
from aquatic_nb.kaq import natural_group_size, packable
from aquatic_nb.layers import AQLinear, from_aq, swap, uniform_codebook

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2}   # largest error over the largest value: the result's rounding


def random_layer(kind, scheme, O, I, g, stride=1, pad=1, dtype=torch.float16, bias=True, groups=1):
    "A packed layer ('linear', 'conv1x1' or 'conv3x3') with random codes, and codebooks that respect the int8 limit."
    if kind == 'linear': m = nn.Linear(I, O, bias=bias)
    elif kind == 'conv1x1': m = nn.Conv2d(I, O, 1, stride, 0, bias=bias, groups=groups)
    else: m = nn.Conv2d(I, O, 3, stride, pad, bias=bias, groups=groups)
    if bias: m.bias.data = torch.randn(O, generator=g)
    N, M, K, d = m.weight[0].numel(), scheme.n_codebooks, scheme.n_codewords, scheme.group_size
    codes = torch.randint(K, (O, -(-N//d), M), generator=g).short()
    if scheme.kind == 'uniform': books = uniform_codebook(scheme)
    elif scheme.codebook_dtype == 'int8': books = torch.randint(-(127//M), 127//M + 1, (M, K, d), generator=g).to(torch.int8)
    else: books = torch.randn(M, K, d, generator=g).half()
    unit = 1 if scheme.codebook_dtype == 'fp16' else 50
    scales = (torch.rand(O, generator=g) + .5).half()/(N**.5*unit)
    return from_aq(m.to(dtype), AQTensor(codes, books, scales, tuple(m.weight.shape), scheme))


def reference(layer, x):
    "The layer in float64."
    a = layer.aq
    w = sum(a.codebooks[m].double()[a.codes[..., m].long()] for m in range(a.scheme.n_codebooks)).flatten(1)
    w = (w[:, :layer.weight[0].numel()]*a.scales.double()[:, None]).reshape(a.shape)
    b = None if layer.bias is None else layer.bias.double()
    if isinstance(layer, AQLinear): return F.linear(x.double(), w, b)
    return F.conv2d(x.double(), w, b, layer.stride, layer.padding, layer.dilation, layer.groups)


def error(y, ref):
    "Largest error over the largest value."
    return ((y.double() - ref).abs().max()/ref.abs().max()).item()


def close(y, ref): return error(y, ref) < TOLERANCE[y.dtype]


def random_case(i):
    "Case i of any number: (packed layer, input), both on the CPU; sizes, schemes, strides, dtypes and memory orders are drawn."
    g, shared = generator(i, 'cuda case'), generator(i//1000, 'cuda schemes')
    pick = lambda *options, g=g: options[int(torch.randint(len(options), (), generator=g))]
    upto = lambda n, least=1, g=g: int(torch.randint(least, n + 1, (), generator=g))
    draw = lambda group: Scheme(upto(5, g=shared), upto(12, g=shared), group, pick('int8', 'int8', 'fp16', g=shared))
    for_rows, for_kernels, for_none = (draw(8), draw(8)), (draw(9), draw(9)), draw(upto(16, g=shared))   # a thousand cases share
    kind, dtype = pick('linear', 'conv1x1', 'conv3x3'), pick(torch.float16, torch.float16, torch.bfloat16)
    fused = pick(*(for_kernels if kind == 'conv3x3' else for_rows))
    scheme = pick(fused, fused, fused, for_none)                              # programs are compiled once a scheme, so there are few
    I = upto(160) if pick(True, False, False) else 8*upto(24)
    layer = random_layer(kind, scheme, upto(150), I, g, stride=pick(1, 1, 2), pad=pick(0, 1), dtype=dtype, bias=pick(True, False))
    tokens = pick((upto(8),), (upto(8),), (upto(70),), (upto(3), upto(40)))
    if kind == 'linear': return layer, torch.randn(*tokens, I, generator=g).to(dtype)
    x = torch.randn(upto(3), I, upto(20, 3), upto(20, 3), generator=g).to(dtype)
    return layer, x.to(memory_format=torch.channels_last) if pick(True, False) else x


def pack_randomly(model, g, n_codebooks=2, bits=8):
    "Every packable layer with random codes (`bits`, and one more for 3x3 kernels, a code), in place: times do not depend on codes."
    for name, m in packable(model).items():
        d, (O, N) = natural_group_size(m.weight.shape), (len(m.weight), m.weight[0].numel())
        s = Scheme(n_codebooks, bits + (d == 9 and bits > 7), d)
        reach = 127//n_codebooks
        codes = torch.randint(s.n_codewords, (O, -(-N//d), n_codebooks), generator=g).short()
        books = torch.randint(-reach, reach + 1, (n_codebooks, s.n_codewords, d), generator=g).to(torch.int8)
        swap(model, name, from_aq(m, AQTensor(codes, books, torch.full((O,), .02/N**.5).half(), tuple(m.weight.shape), s)))
    return model
