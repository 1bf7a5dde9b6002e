"""Random packed layers and what they should compute: for the tests of the CUDA kernels, for their notebook, and for `make gpu`."""
import torch
import torch.nn.functional as F
from torch import nn

from aquatic_nb.aq import AQTensor
from aquatic_nb.layers import AQLinear, from_aq, uniform_codebook

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
