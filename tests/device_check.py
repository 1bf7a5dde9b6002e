"""A CUDA device that is only pretended: what is wrong on a GPU is wrong here, without one.

`with pretend() as device:` makes `'cuda'` a device like any other: `.to('cuda')`, `torch.zeros(3, device='cuda')`, modules, gradients. Its tensors
(`OnDevice`) say `cuda:0` and hold a tensor on the CPU, which computes; torch's dispatcher shows every operation, those of the backward pass included:

- one that mixes devices is an error, with its name and the line of the library (the exceptions are CUDA's own: tensors without dimensions, and
  indices on the host); so are `.numpy()`, and a random generator of another device;
- whatever makes the host wait for the device is counted, with its line: `.item()`, `bool()`, `.tolist()`, `.cpu()`, results whose size the host must
  learn (`nonzero`, masks as indices, `unique`, ...), checks of a solver; copies to the device are counted too.

Not seen: what happens in threads other than the one that opened it, `torch.autocast` (off where there is no CUDA), and everything about speed.
"""
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten
CUDA = torch.device('cuda', 0)


class DeviceError(RuntimeError): "What CUDA would refuse."


class Device:
    "What was seen: `counts[kind]` and `places[kind, line]`; the kinds are 'item', 'size', 'check', 'to host', 'to device'."
    def __init__(self): self.counts, self.places, self.depth = Counter(), Counter(), 0

    def note(self, kind):
        self.counts[kind] += 1
        self.places[kind, place()] += 1

    @property
    def waits(self): return sum(n for kind, n in self.counts.items() if kind != 'to device')
    def told(self): return '\n'.join(f'{n:5d} {kind:9s} {where}' for (kind, where), n in self.places.most_common())


_open = [Device()]                                              # devices pretended now, innermost last; the first counts for nobody


def place():
    "The innermost line of the library that is running, as 'file.function: text'."
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if 'aquatic_nb' in path.parts:
            return f'{path.stem}.{frame.f_code.co_name}: {path.read_text().splitlines()[frame.f_lineno - 1].strip()}'
        frame = frame.f_back
    return 'outside of the library'


def is_cuda(device): return device is not None and torch.device(device).type == 'cuda'


class OnDevice(torch.Tensor):
    "A tensor that says it is on cuda:0."
    @staticmethod
    def __new__(cls, held):
        new = torch.Tensor._make_wrapper_subclass(cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(),
                                                  dtype=held.dtype, device='cpu', requires_grad=False)
        new._held = held
        return new

    device, is_cuda, is_cpu = (property(lambda self, value=value: value) for value in (CUDA, True, False))
    def data_ptr(self): return self._held.data_ptr()
    def get_device(self): return 0
    def numpy(self, *args, **kwargs):
        raise TypeError(f"can't convert cuda:0 device type tensor to numpy; copy it to the host first ({place()})")
    __array__ = numpy
    def tolist(self):
        _open[-1].note('item')
        return self._held.detach().tolist()
    def __deepcopy__(self, memo):
        new = OnDevice(self._held.clone())
        memo[id(self)] = new = torch.nn.Parameter(new, self.requires_grad) if isinstance(self, torch.nn.Parameter) else new
        return new
    def __reduce_ex__(self, protocol): return self._held.__reduce_ex__(protocol)
    def __repr__(self): return f'OnDevice({self._held})'

    @property
    def data(self): return self.detach()
    @data.setter
    def data(self, new):
        if not isinstance(new, OnDevice): new = OnDevice(new)
        torch.Tensor.data.__set__(self, new)
        self._held = new._held

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None): return call(func, args, kwargs or {})
    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None): return run(func, args, kwargs or {})


# ---- functions, as Python calls them: where tensors move

class _Move(torch.autograd.Function):
    "Between host and device, for tensors that need a gradient."
    @staticmethod
    def forward(ctx, x, there): ctx.back = not there; return moved(x.detach(), there)
    @staticmethod
    def backward(ctx, g): return moved(g, ctx.back), None


def moved(x, there):
    "A copy on the other side."
    _open[-1].note('to device' if there else 'to host')
    return OnDevice(x.detach().clone()) if there else x._held.detach().clone()


def target(func, x, args, kwargs):
    "(device or None, further arguments) of `.to`, `.cuda` and `.cpu`."
    if func is torch.Tensor.cpu: return torch.device('cpu'), args, kwargs
    if func is torch.Tensor.cuda: return CUDA, args[1:], {k: v for k, v in kwargs.items() if k != 'device'}
    kwargs = dict(kwargs)
    device = kwargs.pop('device', None)
    if args and isinstance(args[0], torch.Tensor): return args[0].device, (args[0].dtype, *args[1:]), kwargs
    if args and isinstance(args[0], (str, torch.device, int)): return args[0], args[1:], kwargs
    return device, args, kwargs


def transfer(func, args, kwargs):
    x = args[0]
    device, rest, kwargs = target(func, x, args[1:], kwargs)
    here = isinstance(x, OnDevice)
    there = here if device is None else is_cuda(device)
    if there != here: x = _Move.apply(x, there) if x.requires_grad and torch.is_grad_enabled() else moved(x, there)
    kwargs.pop('non_blocking', None)
    rest = tuple(a for a in rest if not isinstance(a, bool))
    return x.to(*rest, **kwargs) if rest or kwargs else x


MOVES = {torch.Tensor.to, torch.Tensor.cuda, torch.Tensor.cpu}


def call(func, args, kwargs):
    "One call of a torch function."
    device = _open[-1]
    with torch._C.DisableTorchFunctionSubclass():
        if func in MOVES: return transfer(func, args, kwargs)
        if func is torch.Tensor.data.__set__ and not isinstance(args[0], OnDevice) and isinstance(args[1], OnDevice):
            return torch.utils.swap_tensors(args[0], torch.nn.Parameter(args[1], args[0].requires_grad))
        wanted = kwargs.get('device')
        if is_cuda(wanted):
            if getattr(kwargs.get('generator'), 'device', CUDA).type != 'cuda':
                raise DeviceError(f'{func.__name__}: a generator of the CPU for a tensor on cuda ({place()})')
            data = args[0] if args and func in (torch.tensor, torch.as_tensor) else None
            if isinstance(data, OnDevice): return data if func is torch.as_tensor else data.clone()
            out = func(*args, **{k: v for k, v in kwargs.items() if k != 'device'})
            if func in (torch.tensor, torch.as_tensor): device.note('to device')
            return out if isinstance(out, OnDevice) else OnDevice(out.detach()).requires_grad_(out.requires_grad)
        flat, _ = tree_flatten((args, kwargs))
        if not any(isinstance(t, OnDevice) for t in flat): return func(*args, **kwargs)
        device.depth += 1                                       # what such a function makes inside of itself is on the device
        try: return func(*args, **kwargs)
        finally: device.depth -= 1


class _Calls(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None): return call(func, args, kwargs or {})


# ---- operations, as the dispatcher sees them: what mixes, and what waits

INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
WAITS = {aten._local_scalar_dense.default: 'item', aten._linalg_check_errors.default: 'check', aten.equal.default: 'check'}
WAITS |= dict.fromkeys((aten.nonzero.default, aten.masked_select.default, aten._unique2.default, aten.unique_consecutive.default,
                        aten.unique_dim.default, aten.bincount.default, aten.repeat_interleave.Tensor), 'size')
CHECKED_INSIDE = {aten.linalg_inv_ex.default, aten.linalg_solve_ex.default, aten._linalg_solve_ex.default, aten.linalg_cholesky_ex.default}


def wait_of(func, args):
    "How an operation on the device makes the host wait, or None."
    if func in INDEXING and any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in args[1]):
        fills = func is not aten.index.Tensor and args[2].dim() == 0          # x[mask] = number is a masked fill
        return None if fills else 'size'
    return WAITS.get(func)


def refuse_mixtures(func, args, tensors):
    "Raise what CUDA raises for tensors of two devices."
    host = [t for t in tensors if not isinstance(t, OnDevice)]
    if not host or len(host) == len(tensors) or func is aten.copy_.default: return
    if func in INDEXING and isinstance(args[0], OnDevice):
        indices = [t for t in host if any(t is i for i in args[1])]
        if indices: _open[-1].note('to device')
        host = [t for t in host if not any(t is i for i in indices)]
    changed = func._schema.is_mutable and isinstance(args[0], torch.Tensor) and not isinstance(args[0], OnDevice)
    if changed or any(t.dim() for t in host):
        shapes = ', '.join(f"{'cuda' if isinstance(t, OnDevice) else 'cpu'} {list(t.shape)}" for t in tensors)
        raise DeviceError(f'{func}: tensors on two devices, {shapes} ({place()})')


def run(func, args, kwargs):
    "One operation, on the device if one of its tensors is, or if it makes something for an operation that is."
    device, (flat, _) = _open[-1], tree_flatten((args, kwargs))
    tensors = [t for t in flat if isinstance(t, torch.Tensor)]
    held = {id(t._held): t for t in tensors if isinstance(t, OnDevice)}
    on = bool(held) or is_cuda(kwargs.get('device')) or (not tensors and device.depth > 0)
    refuse_mixtures(func, args, tensors)
    if held:
        if kind := wait_of(func, args): device.note(kind)
        if func is aten.copy_.default and len({isinstance(t, OnDevice) for t in args[:2]}) == 2:
            device.note('to device' if isinstance(args[0], OnDevice) else 'to host')
        if any(isinstance(o, torch.Generator) and o.device.type == 'cpu' for o in flat):
            raise DeviceError(f'{func}: a generator of the CPU for a tensor on cuda ({place()})')
    bare = lambda o: o._held if isinstance(o, OnDevice) else torch.device('cpu') if isinstance(o, torch.device) else o
    out = func(*tree_map(bare, args), **tree_map(bare, kwargs))
    if not on or func is aten._local_scalar_dense.default or func is aten.copy_.default and not isinstance(args[0], OnDevice): return out
    return tree_map(lambda t: held.get(id(t), t if isinstance(t, OnDevice) else OnDevice(t)) if isinstance(t, torch.Tensor) else t, out)


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None): return run(func, args, kwargs or {})


@contextmanager
def pretend():
    "Inside, 'cuda' is a device; gives a `Device`, which counts."
    lazy, swap = torch.cuda._lazy_init, torch.__future__.get_swap_module_params_on_conversion()
    torch.cuda._lazy_init = lambda: None
    torch.__future__.set_swap_module_params_on_conversion(True)               # a moved module keeps its parameters, as on CUDA
    _open.append(Device())
    try:
        with _Operations(), _Calls(): yield _open[-1]
    finally:
        _open.pop()
        torch.cuda._lazy_init = lazy
        torch.__future__.set_swap_module_params_on_conversion(swap)
