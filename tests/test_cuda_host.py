"""The CUDA module without a GPU: host logic, dispatch, bad input, and the kernels' own source run on the CPU."""
import ctypes
import os
import shutil
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from cuda_cases import close, pack_randomly, random_case, random_layer, reference
from cuda_emulator import Emulator, can_emulate
from hypothesis import HealthCheck, given, settings, strategies as st

from aquatic_nb import cuda
from aquatic_nb.aq import Scheme, decode, stored_bytes
from aquatic_nb.cuda import (Job, aligned, choose, decode_into, fused_ways, job_of, plan_launch, run_on, run_safely, why_not_call,
                             why_not_device, why_not_fused)
from aquatic_nb.kernels import cuda_runtime
from aquatic_nb.kernels.cuda_runtime import CHIPS, Gpu, chip_of, compile_cubin, find_nvrtc
from aquatic_nb.kernels.cuda_source import Args, Program
from aquatic_nb.layers import pick_kernel

needs_gxx = pytest.mark.skipif(not can_emulate, reason='the emulator needs Linux and g++')


# ---------------------------------------------------------------- the kernels' source on the CPU

few_examples = settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))


@needs_gxx
@few_examples
@given(st.integers(0, 99), st.integers(1, 50), st.integers(1, 12), st.integers(1, 8), st.integers(0, 2))
def test_few_tokens(seed, O, eights, tokens, order):
    g = torch.Generator().manual_seed(seed)
    layer, x = random_layer('linear', Scheme(2, 8, 8), O, 8*eights, g), torch.randn(tokens, 8*eights, generator=g).half()
    assert close(run_on(Emulator(order), layer, x, 'few'), reference(layer, x))


@needs_gxx
@few_examples
@given(st.integers(0, 99), st.integers(1, 90), st.integers(1, 20), st.integers(1, 16), st.integers(0, 2))
def test_gemm_rows(seed, O, eights, tokens, order):
    g = torch.Generator().manual_seed(seed)
    layer, x = random_layer('linear', Scheme(2, 8, 8), O, 8*eights, g), torch.randn(tokens, 8*eights, generator=g).half()
    assert close(run_on(Emulator(order), layer, x, 'gemm'), reference(layer, x))


@needs_gxx
@few_examples
@given(st.integers(0, 99), st.integers(1, 40), st.integers(1, 50), st.integers(1, 3), st.integers(1, 5), st.integers(2, 7), st.integers(0, 2))
def test_conv1x1_channels_first_any_number_of_channels(seed, O, I, images, h, w, order):
    g = torch.Generator().manual_seed(seed)
    layer, x = random_layer('conv1x1', Scheme(1, 8, 8), O, I, g), torch.randn(images, I, h, w, generator=g).half()
    backend = Emulator(order)
    launch = plan_launch('gemm', layer.scheme, job_of(layer, x), x.dtype, backend.chip, NT=2)
    assert launch.program.shared_bytes() < 49152
    assert close(run_on(backend, layer, x, 'gemm', NT=2), reference(layer, x))


@needs_gxx
@few_examples
@given(st.integers(0, 99), st.integers(1, 70), st.integers(1, 40), st.integers(1, 2), st.integers(2, 11), st.integers(2, 11), st.integers(0, 1), st.integers(0, 2))
def test_conv3x3_any_map(seed, O, I, images, h, w, pad, order):
    g = torch.Generator().manual_seed(seed)
    if min(h, w) + 2*pad < 3: pad = 1
    layer, x = random_layer('conv3x3', Scheme(2, 8, 9), O, I, g, pad=pad), torch.randn(images, I, h, w, generator=g).half()
    assert close(run_on(Emulator(order), layer, x, 'conv', NT=4), reference(layer, x))


CASES = [('few', 'linear', Scheme(4, 12, 8), 33, 72, (3, 72), {}), ('few', 'linear', Scheme(1, 8, 8, 'fp16'), 16, 40, (8, 40), {'R': 2}),
         ('gemm', 'linear', Scheme(3, 7, 8), 130, 72, (70, 72), {'MT': 2}), ('gemm', 'conv1x1', Scheme(2, 9, 8), 65, 48, (2, 48, 6, 7), {'last': True}),
         ('conv', 'conv3x3', Scheme(2, 9, 9), 33, 40, (1, 40, 12, 9), {'last': True, 'stride': 2}), ('conv', 'conv3x3', Scheme(3, 8, 9), 20, 18, (2, 18, 8, 8), {'MT': 2, 'stride': 2, 'pad': 0}),
         ('conv', 'conv3x3', Scheme(1, 8, 9, 'fp16'), 12, 20, (1, 20, 5, 17), {})]


@needs_gxx
@pytest.mark.parametrize('case', CASES, ids=lambda c: f'{c[0]}-{c[2]}')
@pytest.mark.parametrize('dtype', [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
def test_every_way_of_storing(case, dtype):
    how, kind, scheme, O, I, shape, more = case
    more, g = dict(more), torch.Generator().manual_seed(3)
    last, stride, pad = more.pop('last', False), more.pop('stride', 1), more.pop('pad', 1)
    layer = random_layer(kind, scheme, O, I, g, stride, pad, dtype, bias=how != 'conv')
    x = torch.randn(*shape, generator=g).to(dtype)
    if last: x = x.to(memory_format=torch.channels_last)
    ys = [run_on(Emulator(order), layer, x, how, **more) for order in range(3)]
    assert close(ys[0], reference(layer, x)) and torch.equal(ys[0], ys[1]) and torch.equal(ys[0], ys[2])
    if last: assert ys[0].is_contiguous(memory_format=torch.channels_last)


@needs_gxx
@pytest.mark.parametrize('scheme,kind,I', [(Scheme(2, 8, 8), 'linear', 50), (Scheme(2, 5, 8), 'linear', 64), (Scheme(5, 8, 16), 'linear', 40), (Scheme(2, 9, 9), 'conv3x3', 7), (Scheme(1, 4, 1, kind='uniform'), 'linear', 33), (Scheme(2, 8, 9), 'last', 8)], ids=str)
def test_decode_is_exact(scheme, kind, I):
    g = torch.Generator().manual_seed(1)
    layer = random_layer('conv3x3' if kind == 'last' else kind, scheme, 11, I, g)
    x = torch.randn(2, I, generator=g).half() if kind == 'linear' else torch.randn(1, I, 5, 5, generator=g).half()
    if kind == 'last': x = x.to(memory_format=torch.channels_last)
    for dtype in (torch.float16, torch.bfloat16)[:2 if kind != 'linear' else 1]:
        for order in (0, 1):
            assert torch.equal(decode_into(Emulator(order), layer, x.to(dtype), job_of(layer, x)), decode(layer.aq, dtype))


def test_random_cases_are_of_all_kinds_and_repeat():
    cases = [random_case(i) for i in range(0, 10000, 83)]
    seen = {how for l, x in cases for how in fused_ways(l.scheme, job_of(l, aligned(x)), CHIPS[0].shared)}
    assert seen == {'few', 'gemm', 'conv'} and all(why_not_call(*case) is None for case in cases)
    assert len({l.scheme for l, _ in cases}) > 15 and {x.dtype for _, x in cases} == {torch.float16, torch.bfloat16}
    again, x = random_case(83)
    assert torch.equal(again.aq.codes, cases[1][0].aq.codes) and torch.equal(x, cases[1][1])


@needs_gxx
def test_codebooks_too_large_for_shared_memory_are_read_from_device_memory():
    class Small(Emulator):
        def __init__(self): super().__init__(chip=chip_of('a small card', 10, 4096))
    layer, x = random_layer('linear', Scheme(2, 10, 8), 9, 24, torch.Generator().manual_seed(0)), torch.randn(2, 24).half()
    assert choose(layer.scheme, job_of(layer, x), Small().chip) == 'scratch'
    assert plan_launch('decode', layer.scheme, job_of(layer, x), x.dtype, Small().chip).program.SHARED_BOOKS == 0
    assert torch.equal(decode_into(Small(), layer, x, job_of(layer, x)), decode(layer.aq, torch.float16))
    assert close(run_on(Small(), layer, x), reference(layer, x))


@needs_gxx
def test_split_sums_repeat():
    g = torch.Generator().manual_seed(0)
    layer, x = random_layer('conv3x3', Scheme(2, 8, 9), 8, 256, g), torch.randn(1, 256, 4, 4, generator=g).half()
    assert plan_launch('conv', layer.scheme, job_of(layer, x), x.dtype, CHIPS[0]).splits > 1
    a, b = (run_on(Emulator(order), layer, x, 'conv') for order in (0, 2))
    assert torch.equal(a, b) and close(a, reference(layer, x))


@needs_gxx
@pytest.mark.parametrize('fault', ['barrier', 'bounds', 'stuck'])
def test_the_emulator_finds_planted_faults(fault):
    plant = {'barrier': ("'aq_gemm', 'block_sync();', ''"), 'bounds': ("'aq_gemm', 'a.O - 1', 'a.O + 9999'"), 'stuck': ("'aq_gemm', 'block_sync();', 'if (threadIdx.x) block_sync();'")}[fault]
    code = textwrap.dedent(f'''
        import torch
        from aquatic_nb.cuda import run_on
        from aquatic_nb.kernels.cuda_source import SOURCES
        from cuda_cases import random_layer, reference, close
        from cuda_emulator import Emulator
        from aquatic_nb.aq import Scheme
        kernel, old, new = {plant}
        assert old in SOURCES[kernel]
        SOURCES[kernel] = SOURCES[kernel].replace(old, new)
        g = torch.Generator().manual_seed(0)
        layer, x = random_layer('linear', Scheme(2, 8, 8), 20, 256, g), torch.randn(12, 256, generator=g).half()
        ys = [run_on(Emulator(order), layer, x, 'gemm') for order in (0, 1)]
        assert torch.equal(*ys) and close(ys[0], reference(layer, x)), 'orders differ'
    ''')
    here = os.path.dirname(os.path.abspath(__file__))
    path = os.pathsep.join([here, os.path.dirname(here), os.environ.get('PYTHONPATH', '')])
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': path})
    assert done.returncode != 0
    if fault == 'bounds': assert done.returncode == -11, done.stderr
    else: assert {'barrier': 'orders differ', 'stuck': 'wait at a barrier'}[fault] in done.stderr


# ---------------------------------------------------------------- compilers, where they are

def test_the_source_compiles_with_nvrtc():
    try: library = find_nvrtc()
    except RuntimeError as e: pytest.skip(str(e))
    for arch in (80, 90):
        for p in (Program('aq_few', 2, 8, 8), Program('aq_conv', 2, 8, 9, BF16=1), Program('aq_decode', 2, 10, 9, LAST=0)):
            code, log = compile_cubin(p.text(), arch, library)
            assert code[:4] == b'\x7fELF' and '0 bytes spill stores' in log
    with pytest.raises(RuntimeError, match='NVRTC could not compile for sm_80.*no_such_thing'):
        compile_cubin('__global__ void f() { no_such_thing(); }', 80, library)


class Nvrtc:
    "A compiler that only answers: a log, machine code, or an error."
    def __init__(self, log=b'', code=b'', bad=0): self.said, self.bad, self.gone = dict(ProgramLog=log + b'\0', CUBIN=code), bad, False
    def nvrtcCreateProgram(self, program, text, *rest): self.text = text; return 0
    def nvrtcCompileProgram(self, program, n, options): self.options = list(options)[:n]; return self.bad
    def nvrtcDestroyProgram(self, program): self.gone = True
    def __getattr__(self, name):
        part = self.said[name.removeprefix('nvrtcGet').removesuffix('Size')]
        if name.endswith('Size'): return lambda program, size: setattr(size._obj, 'value', len(part))
        return lambda program, buffer: ctypes.memmove(buffer, part, len(part))


def test_what_the_compiler_is_told_and_what_is_read_from_it():
    library = Nvrtc(b'ptxas info: Used 40 registers', b'\x7fELF\0\0code\0')
    assert compile_cubin('text', 90, library) == (b'\x7fELF\0\0code\0', 'ptxas info: Used 40 registers')
    assert library.text == b'text' and b'--gpu-architecture=sm_90' in library.options and library.gone
    library = Nvrtc(b'line 1: error\nline 2', bad=6)
    with pytest.raises(RuntimeError, match=r'could not compile for sm_80 \(error 6\): line 1: error | line 2'): compile_cubin('text', 80, library)
    assert library.gone


@pytest.mark.skipif(shutil.which('nvcc') is None, reason='no nvcc')
@pytest.mark.parametrize('kernel', ['aq_conv'] + [pytest.param(k, marks=pytest.mark.slow) for k in ('aq_decode', 'aq_few', 'aq_gemm', 'aq_reduce')])
def test_the_source_compiles_with_nvcc(kernel, tmp_path):
    p = Program(kernel, 2, 8, 9 if kernel == 'aq_conv' else 8)
    (tmp_path/'k.cu').write_text(p.text())
    for arch in ('sm_80', 'sm_90'):
        done = subprocess.run(['nvcc', '-std=c++17', f'-arch={arch}', '-Xptxas', '-v', '-cubin', '-o', str(tmp_path/'k.cubin'), str(tmp_path/'k.cu')], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert '0 bytes spill stores' in done.stderr and '0 bytes stack frame' in done.stderr


def test_nvrtc_missing_is_said():
    with pytest.raises(RuntimeError, match='libnvrtc.*CUDA build of torch') as e:
        old, ctypes.CDLL = ctypes.CDLL, lambda name: (_ for _ in ()).throw(OSError(name))
        try: find_nvrtc(['/nowhere'])
        finally: ctypes.CDLL = old
    assert '/nowhere' in str(e.value)


# ---------------------------------------------------------------- host logic

def linear(scheme=Scheme(2, 8, 8), O=24, I=64, **kw): return random_layer('linear', scheme, O, I, torch.Generator().manual_seed(0), **kw)


def test_no_gpu_no_cuda_kernel_and_the_reason_is_said():
    layer, x = linear(dtype=torch.float32), torch.randn(3, 64)
    kernel, reasons = pick_kernel(layer, x)
    assert not kernel.name.startswith('cuda') and "'cpu'" in reasons['cuda']
    layer.kernel = 'cuda_fused'
    assert torch.equal(layer(x), layer.dense(x, layer.weight)) or torch.allclose(layer(x), layer.dense(x, layer.weight), atol=1e-4)


@pytest.mark.parametrize('args,part', [(('cpu', torch.float16), "'cpu'"), (('cuda', torch.float32), 'float32'), (('cuda', torch.int8), 'int8'), (('cuda', torch.float16, (7, 5)), '7.5'), (('mps', torch.float16), "'mps'")])
def test_refused_devices(args, part): assert part in why_not_device(*args)


def test_accepted_devices():
    for capability in ((8, 0), (8, 6), (9, 0), (12, 0)): assert why_not_device('cuda', torch.bfloat16, capability) is None


def test_refused_calls():
    layer = linear()
    x = torch.randn(3, 64).half()
    assert why_not_call(layer, x) is None
    assert 'gradient' in why_not_call(layer, x.clone().requires_grad_())
    with torch.no_grad(): assert why_not_call(layer, x.clone().requires_grad_()) is None
    assert '65 channels' in why_not_call(layer, torch.randn(3, 65).half())
    assert 'bfloat16' in why_not_call(layer, x.bfloat16())
    assert 'empty' in why_not_call(layer, x[:0])
    assert '1 dimensions' in why_not_call(layer, x[0])
    assert '96 bits' in why_not_call(linear(Scheme(8, 12, 8)), x)
    assert 'meta' in why_not_call(layer, x.to('meta'))
    raw = torch.zeros(layer.codes.numel() + 1, dtype=torch.uint8)
    layer.codes.data = raw[1:].view(layer.codes.shape)
    assert 'codes' in why_not_call(layer, x)


@pytest.mark.parametrize('scheme,job,part', [
    (Scheme(5, 8, 8), Job('linear', 8, 8, 64, 4, True), '5 codebooks'), (Scheme(2, 8, 16), Job('linear', 8, 4, 64, 4, True), 'group_size=16'),
    (Scheme(2, 8, 8), Job('linear', 8, 8, 60, 4, True), 'multiple of 8'), (Scheme(2, 8, 9), Job('conv3x3', 8, 12, 108, 64, True, 8, 8, 8, 8, 1, 1), 'multiple of 8'),
    (Scheme(2, 8, 9), Job('conv3x3', 8, 16, 144, 4, False, 8, 8, 2, 2, 3, 1), 'stride 3'), (Scheme(4, 12, 9, 'fp16'), Job('conv3x3', 8, 16, 144, 64, False, 8, 8, 8, 8, 1, 1), 'shared memory'),
    (Scheme(2, 8, 9), Job('other', 8, 16, 144, 64, False), 'plain'), (Scheme(2, 8, 8), Job('linear', 8, 8, 64, 0, True), 'no tokens')], ids=str)
def test_what_is_not_fused_goes_through_scratch(scheme, job, part):
    assert part in why_not_fused(scheme, job, CHIPS[0].shared) and choose(scheme, job, CHIPS[0]) == 'scratch'


def test_layers_become_jobs():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 8, 9, 7).half()
    assert job_of(linear(), torch.randn(2, 5, 64).half()) == Job('linear', 24, 8, 64, 10, True, 1, 10, 1, 10)
    conv = random_layer('conv3x3', Scheme(2, 8, 9), 6, 8, g, stride=2)
    assert job_of(conv, x) == Job('conv3x3', 6, 8, 72, 40, False, 9, 7, 5, 4, 2, 1)
    assert job_of(conv, x.to(memory_format=torch.channels_last)).last
    assert job_of(random_layer('conv3x3', Scheme(2, 8, 9), 6, 8, g, groups=2), x).kind == 'other'
    for change in ({'dilation': (2, 2)}, {'padding_mode': 'reflect'}, {'padding': 'same'}, {'padding': (1, 0)}, {'stride': (1, 2)}):
        odd = random_layer('conv3x3', Scheme(2, 8, 9), 6, 8, g)
        for k, v in change.items(): setattr(odd, k, v)
        assert job_of(odd, x).kind == 'other', change


@needs_gxx
def test_odd_convolutions_run_through_scratch():
    g = torch.Generator().manual_seed(0)
    for kw in ({'groups': 2}, {'stride': 3}):
        layer, x = random_layer('conv3x3', Scheme(2, 8, 9), 6, 8, g, **kw), torch.randn(2, 8, 9, 7, generator=g).half()
        assert close(run_on(Emulator(), layer, x), reference(layer, x))


@pytest.mark.parametrize('chip', CHIPS, ids=lambda c: c.name)
def test_grids_cover_the_work_and_fit_the_chip(chip):
    for tokens in (1, 8, 9, 64, 1000):
        job = Job('linear', 960, 120, 960, tokens, True, 1, tokens, 1, tokens)
        launch = plan_launch('gemm', Scheme(2, 8, 8), job, torch.float16, chip)
        assert launch.grid[0]*8*launch.program.NT >= tokens and launch.grid[1]*64*launch.program.MT >= 960
        assert launch.grid[2] == launch.splits <= 15 and launch.program.shared_bytes() <= chip.shared
    assert choose(Scheme(2, 8, 8), Job('linear', 7680, 120, 960, 2, True), chip) == 'few'
    assert choose(Scheme(2, 8, 8), Job('linear', 7680, 120, 960, 16384, True), chip) == 'scratch'


def test_misaligned_and_strided_inputs_are_copied_and_aligned_ones_are_not():
    x = torch.randn(4, 64).half()
    assert aligned(x) is x or aligned(x).data_ptr() == x.data_ptr()
    last = torch.randn(2, 8, 4, 4).half().to(memory_format=torch.channels_last)
    assert aligned(last).data_ptr() == last.data_ptr() and aligned(last).stride() == last.stride()
    for odd in (torch.randn(257).half()[1:].view(4, 64), torch.randn(64, 4).half().T, torch.randn(2, 16, 4, 4).half()[:, ::2]):
        assert torch.equal(aligned(odd), odd) and aligned(odd).is_contiguous() and aligned(odd).data_ptr() % 16 == 0


def test_compile_failure_gives_one_warning_and_dense_results():
    class Broken(Emulator):
        def build(self, program): raise RuntimeError('NVRTC could not compile for sm_80: planted')
    backend, layer, x = Broken(), linear(), torch.randn(3, 64).half()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        for _ in range(3): assert torch.equal(run_safely(backend, layer, x), layer.dense(x, layer.weight))
    assert len(seen) == 1 and 'planted' in str(seen[0].message) and 'planted' in backend.broken


@needs_gxx
def test_a_fault_at_run_time_is_not_hidden():
    class Faulty(Emulator):
        def launch(self, *args): raise RuntimeError('illegal address')
    backend = Faulty()
    with pytest.raises(RuntimeError, match='illegal address'): run_safely(backend, linear(), torch.randn(3, 64).half(), 'few')
    assert backend.broken is None


def test_a_measured_table_decides(tmp_path):
    path, job = tmp_path/'t.csv', Job('linear', 24, 8, 64, 3, True, 1, 3, 1, 3)
    path.write_text('chip,kind,O,N,tokens,how\nH200,linear,24,64,3,scratch\n')
    table = cuda.read_table(str(path))
    assert choose(Scheme(2, 8, 8), job, CHIPS[0], table) == 'scratch' and choose(Scheme(2, 8, 8), job, CHIPS[2], table) == 'few'
    assert cuda.launches(Scheme(2, 8, 8), job, torch.float16, CHIPS[0], None, str(path))[0] == 'scratch'
    for text, part in (('chip,kind,O,N,tokens,how\nH200,linear,24,64,3,magic\n', 'magic'), ('chip,kind\nH200,linear\n', 'columns'), ('chip,kind,O,N,tokens,how\nH200,linear,x,64,3,few\n', 'line 2')):
        bad = tmp_path/f'{part}.csv'; bad.write_text(text)
        with pytest.raises(ValueError, match=part): cuda.read_table(str(bad))


def test_counts_are_those_of_the_format():
    s, job = Scheme(2, 8, 8), Job('linear', 960, 120, 960, 1, True)
    floor = stored_bytes(s, (960, 960))/CHIPS[0].bandwidth
    assert all(cuda.computed_seconds(h, s, job, CHIPS[0]) > floor for h in ('few', 'gemm', 'scratch'))


@needs_gxx
def test_measuring_writes_rows_that_the_dispatch_reads(monkeypatch, tmp_path):
    seconds = iter([3e-6, 2e-6, 5e-6, 1e-6])
    def pretend(calls): calls[0](); return next(seconds)
    monkeypatch.setattr(cuda, 'gpu', lambda index: Emulator())
    monkeypatch.setattr(cuda, 'cuda_seconds', pretend)
    rows = cuda.measure_choices(linear(), [torch.randn(3, 64).half()])
    assert [r['way'] for r in rows] == ['few', 'gemm', 'scratch'] and all(r['how'] == 'gemm' for r in rows) and abs(rows[1]['ratio'] - .5) < 1e-9
    names = ['chip', 'kind', 'O', 'N', 'tokens', 'how']
    path = tmp_path/'choices.csv'; path.write_text('\n'.join([','.join(names)] + [','.join(str(r[n]) for n in names) for r in rows[:1]]) + '\n')
    assert cuda.read_table(str(path)) == {('H200', 'linear', 24, 64, 3): 'gemm'}


def test_what_reaches_the_driver(monkeypatch):
    """The real launching code against a driver that only writes down what it is told."""
    calls, seen = [], {}
    class Driver:
        def __getattr__(self, name):
            def call(*args):
                calls.append(name)
                if name == 'cuLaunchKernel':
                    seen['grid'], seen['block'], seen['shared'] = args[1:4], args[4:7], args[7]
                    seen['args'] = Args.from_buffer_copy(ctypes.string_at(args[9][0], ctypes.sizeof(Args)))
                return 0
            return call
    class Stream: cuda_stream = 7
    class Here:
        def __enter__(self): return self
        def __exit__(self, *a): return None
    monkeypatch.setattr(torch.cuda, 'device', lambda i: Here())
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda *a: Stream)
    monkeypatch.setattr(cuda_runtime, 'compile_cubin', lambda text, arch: (b'ELF', ''))
    g = Gpu(0, 90, CHIPS[0], Driver())
    layer, x = linear(), torch.randn(3, 64).half()
    run_on(g, layer, x, 'few'); run_on(g, layer, x, 'few')
    assert calls.count('cuModuleLoadData') == 1 and calls.count('cuLaunchKernel') == 2
    a = seen['args']
    assert (a.O, a.J, a.N, a.T, a.splits, a.codes, a.x, a.bits, a.partial) == (24, 8, 64, 3, 1, layer.codes.data_ptr(), x.data_ptr(), None, None)
    assert seen['grid'] == (2, 1, 1) and seen['block'] == (128, 1, 1) and seen['shared'] == Program('aq_few', 2, 8, 8, NT=1).shared_bytes()
    assert ctypes.sizeof(Args) == 8*8 + 11*4 + 4
    assert run_safely(g, layer, x, 'scratch').shape == (3, 24) and 'aq_decode' in {p.kernel for p in g._loaded}
    one = g.scratch(10, torch.float16, 'cpu'); two = g.scratch(5, torch.float16, 'cpu')
    assert one.data_ptr() == two.data_ptr() and two.numel() == 5
    g.driver = type('Bad', (), {'__getattr__': lambda self, name: lambda *args: 999})()
    with pytest.raises(RuntimeError, match='launch of aq_few failed with error 999'): run_on(g, layer, x, 'few')
    other = linear(Scheme(1, 8, 8))
    with pytest.warns(UserWarning, match='error 999'): assert torch.equal(run_safely(g, other, x), other.dense(x, other.weight))


@needs_gxx
@pytest.mark.slow
def test_a_whole_unet_through_the_emulator():
    from aquatic_nb import layers
    from diffusers import UNet2DConditionModel
    torch.manual_seed(0)
    unet = UNet2DConditionModel(sample_size=8, in_channels=3, out_channels=3, down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D'), up_block_types=('CrossAttnUpBlock2D', 'UpBlock2D'),
                                block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=16, attention_head_dim=1, norm_num_groups=8).eval().half()
    g = torch.Generator().manual_seed(0)
    pack_randomly(unet, g)
    args = torch.randn(2, 3, 8, 8, generator=g).half(), 500, torch.randn(2, 1, 16, generator=g).half()
    used, backend = set(), Emulator()
    def run(layer, x):
        x = aligned(x); job = job_of(layer, x)
        how = 'scratch' if why_not_fused(layer.scheme, job, backend.chip.shared) else 'conv' if job.kind == 'conv3x3' else 'few' if job.T <= 8 and job.last else 'gemm'
        used.add((how, job.kind))
        return run_on(backend, layer, x, how)
    layers.register_kernel('emulated', lambda layer, x: why_not_call(layer, x), run, -9)
    try:
        with torch.no_grad():
            layers.set_kernel(unet, 'dense'); want = unet(*args, return_dict=False)[0]
            layers.set_kernel(unet, 'emulated'); got = unet(*args, return_dict=False)[0]
            layers.set_kernel(unet, 'dense'); exact = unet.float()(args[0].float(), 500, args[2].float(), return_dict=False)[0]
    finally: layers.KERNELS.pop('emulated')
    assert {how for how, _ in used} >= {'few', 'gemm', 'conv'}
    off = lambda y: ((y.float() - exact).pow(2).mean()/exact.pow(2).mean()).sqrt().item()
    assert off(got) < max(2*off(want), 5e-3), (off(got), off(want))
