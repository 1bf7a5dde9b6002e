"Which kernel runs a packed layer: by the clock, once; what is kept beside a layer, and when it is dropped."
import copy
import gc
import json
import pickle
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cpu_kernels import LOOSE, agree, make, ranges, reference

from aquatic_nb import cpu
from aquatic_nb.act import attach_act
from aquatic_nb.kernels import int8
from aquatic_nb.kernels.simd import use_width, width, widths
from aquatic_nb.layers import KERNELS, pick_kernel, register_kernel, set_kernel, steady_kernels


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    "A cache folder of this test's own, nothing chosen yet, one thread."
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.setenv('AQUATIC_MEASURE', '1')
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    cpu.forget_choices()
    cpu._said.clear()
    with torch.no_grad(): yield
    torch.set_num_threads(before)
    cpu.forget_choices()


@pytest.fixture
def timed(monkeypatch):
    "The shapes that were timed, and times as the test wants them."
    seen = []
    def fake(layer, view, x):
        seen.append((tuple(layer.weight_shape), tuple(x.shape)))
        return {n: fake.times.get(n, 1.) for n in cpu._candidates(layer, view, x)}
    fake.times = {}
    monkeypatch.setattr(cpu, '_time_ways', fake)
    seen_times = type('Timed', (list,), {})(seen)
    seen_times.seen, seen_times.times = seen, fake.times
    return seen_times


def used(layer, x):
    with torch.no_grad(): return pick_kernel(layer, x)[0].name


# ---------------------------------------------------------------- the choice

NAMES = ('wino2', 'wino4', 'gemm', 'few', 'int8', 'bytes', 'cached', 'fp32')

@settings(max_examples=200, **LOOSE)
@given(st.dictionaries(st.sampled_from(NAMES), st.floats(1e-6, 1.)), st.floats(1e-6, 1.), st.sampled_from(('decode', *NAMES[:5])))
def test_the_choice_never_loses_to_decoding(times, decode, ruled):
    times = {**times, 'decode': decode}
    c = cpu._judge(times, ruled)
    free = min(t for n, t in times.items() if n not in ('bytes', 'cached', 'fp32'))
    assert times[c.free] <= 1.05*free <= 1.05*decode
    assert times[c.best] <= times[c.free]
    if c.best != c.free: assert times[c.best] <= .9*times[c.free]          # bytes are spent for a gain only


@pytest.mark.parametrize('kind,shape', [('conv3x3', (2, 32, 16, 16)), ('conv1x1', (2, 32, 8, 8)), ('linear', (2, 32)), ('linear', (130, 32))])
def test_the_clock_is_asked_once_and_answers_truly(kind, shape):
    layer, x = make(kind, 48, 32, 2, 8), torch.randn(shape)
    agree(layer, x)
    found, = cpu._table(width()).known.values()
    choice, = cpu._chosen.values()
    assert found['decode'] > 0 and choice.times == found
    assert used(layer, x) in (choice.best, choice.free)
    assert found[choice.free] <= 1.05*found['decode']


def test_measured_once_for_all_layers_of_a_shape(timed):
    x = torch.randn(2, 16, 8, 8)
    for seed in range(3):
        layer = make('conv3x3', 24, 16, 2, 9, seed)
        for _ in range(3): layer(x)
    assert timed.seen == [((24, 16, 3, 3), (2, 16, 8, 8))]
    layer(x[:1])
    assert len(timed.seen) == 2


def test_the_next_process_reads_the_file(timed):
    layer, x = make('conv3x3', 24, 16, 2, 9), torch.randn(2, 16, 8, 8)
    timed.times['wino4'] = .1
    layer(x)
    assert used(layer, x) == 'wino4'
    cpu._table(width()).write(0)
    assert cpu.choices_path().exists()
    timed.times.clear()
    cpu.forget_choices()
    assert used(layer, x) == 'wino4' and len(timed.seen) == 1


@pytest.mark.parametrize('spoil', [lambda d: 'nothing', lambda d: json.dumps({**d, 'head': {**d['head'], 'processor': 'another'}}),
                                   lambda d: json.dumps({**d, 'head': {**d['head'], 'version': '0.0.0'}}), lambda d: '[]',
                                   lambda d: json.dumps({**d, 'times': {k: {'decode': -1.} for k in d['times']}}),
                                   lambda d: json.dumps({**d, 'times': {k: {'wino4': 1.} for k in d['times']}})])
def test_a_file_from_elsewhere_is_ignored_and_said_once(timed, capsys, spoil):
    layer, x = make('conv3x3', 24, 16, 2, 9), torch.randn(2, 16, 8, 8)
    layer(x)
    cpu._table(width()).write(0)
    path = cpu.choices_path()
    path.write_text(spoil(json.loads(path.read_text())))
    cpu.forget_choices()
    capsys.readouterr()
    for n in (1, 2): layer(x[:n])
    assert capsys.readouterr().err.count('ignored') == 1
    assert len(timed.seen) == 3


def test_a_folder_that_cannot_be_written_is_said_once(timed, capsys, monkeypatch, tmp_path):
    (tmp_path/'file').write_text('not a folder')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'file'))
    layer = make('linear', 24, 16, 2, 8)
    for n in (1, 2, 3): agree(layer, torch.randn(n, 16))
    cpu._table(width()).write(0)
    assert capsys.readouterr().err.count('timed again in the next process') == 1


def test_a_choice_stands_whatever_the_threads(timed):
    layer, x = make('conv3x3', 40, 16, 2, 9), torch.randn(2, 16, 8, 8)
    timed.times['wino2'] = .1
    first = layer(x)
    timed.times['wino4'] = .01
    torch.set_num_threads(2)
    assert torch.equal(layer(x), first) and len(timed.seen) == 1
    cpu.forget_choices()
    assert used(layer, x) == 'wino4' and len(timed.seen) == 2     # a process that starts with two threads


@pytest.mark.parametrize('off', ['env', 'steady'])
def test_by_rule_no_clock_is_asked(monkeypatch, off):
    def never(*a): raise AssertionError('the clock was asked')
    monkeypatch.setattr(cpu, '_time_ways', never)
    if off == 'env': monkeypatch.setenv('AQUATIC_MEASURE', '0')
    for kind, shape in (('conv3x3', (2, 16, 8, 8)), ('conv1x1', (2, 16, 8, 8)), ('linear', (3, 16)), ('stride2', (2, 16, 8, 8))):
        layer = make(kind, 24, 16, 2, 9)
        if off == 'env': agree(layer, torch.randn(shape))
        else:
            with steady_kernels(): agree(layer, torch.randn(shape))


def test_ranges_of_activations_do_not_depend_on_the_clock(monkeypatch):
    def never(*a): raise AssertionError('the clock was asked')
    monkeypatch.setattr(cpu, '_time_ways', never)
    model = torch.nn.Sequential(make('conv3x3', 24, 16, 2, 9))
    attach_act(model, 8, [dict(input=torch.randn(2, 16, 8, 8))])
    assert model[0].act is not None


def test_a_measure_switch_that_is_neither(monkeypatch):
    monkeypatch.setenv('AQUATIC_MEASURE', 'yes')
    with pytest.raises(ValueError, match='AQUATIC_MEASURE'): make('linear', 24, 16, 2, 8)(torch.randn(2, 16))


def test_kernels_from_elsewhere_are_asked_every_time():
    layer, x, asked = make('linear', 24, 16, 2, 8), torch.randn(2, 16), []
    def supports(m, x):
        asked.append(1)
        return None if x[0, 0] > 100 else 'small'
    try:
        register_kernel('theirs', supports, lambda m, x: torch.zeros(len(x), 24), 200)
        for _ in range(3): agree(layer, x)
        assert len(asked) >= 3
        assert (layer(x + 1000) == 0).all()
    finally: del KERNELS['theirs']


# ---------------------------------------------------------------- plans follow the layer

def test_a_plan_follows_everything_that_it_depends_on():
    layer, x = make('conv3x3', 24, 16, 2, 9), torch.randn(2, 16, 9, 9)
    agree(layer, x); agree(layer, x)
    layer.padding_mode = 'circular'                             # seamless tiling is switched on like this
    agree(layer, x)
    layer.padding_mode = 'zeros'
    layer.act = ranges(layer, 1, None, 8, 0)
    agree(layer, x)
    layer.act = ranges(layer, 1, 8, 4, 1)
    agree(layer, x)
    layer.act = None
    for name in ('dense', 'decode', 'wino2', 'auto'):
        layer.kernel = name
        agree(layer, x)
        if name != 'auto': assert used(layer, x) == name
    for name in widths():
        with use_width(name): agree(layer, x)
    agree(layer, x.to(memory_format=torch.channels_last))
    agree(layer, torch.stack([x, x], -1)[..., 0])
    with torch.enable_grad():
        y = layer(x.requires_grad_())
        y.sum().backward()
        assert x.grad is not None
        layer.bias.requires_grad_()
        assert layer(x.detach()).requires_grad
    assert layer.double()(x.detach().double()).dtype == torch.float64


@pytest.mark.parametrize('kernel', ['auto', 'bytes', 'cached', 'decode', 'wino4'])
@pytest.mark.parametrize('name', ['codes', 'codes_hi', 'codebooks', 'scales', 'bias'])
def test_every_stored_tensor_is_watched(kernel, name):
    layer, x = make('conv3x3', 24, 16, 2, 9), torch.randn(2, 16, 8, 8)
    layer.kernel = kernel
    for _ in range(4): layer(x)
    t, before = getattr(layer, name), layer(x)
    if name in ('codes', 'codes_hi'): t.copy_(t.flip(0))
    else: t.mul_(2 if name != 'codebooks' else -1)
    assert not torch.equal(layer(x), before)
    agree(layer, x)
    setattr(layer, name, torch.nn.Parameter(t.clone().flip(0), requires_grad=False))
    agree(layer, x)
    getattr(layer, name).data = t.clone()
    agree(layer, x)


def test_tensors_made_in_inference_mode_are_followed_too():
    with torch.inference_mode():
        layer, x = make('conv3x3', 24, 16, 2, 9), torch.randn(2, 16, 8, 8)
        for _ in range(3): agree(layer, x)
        assert used(layer, x) not in ('bytes', 'cached')
        layer.scales.mul_(2); layer.codebooks.neg_()
        agree(layer, x)
        layer.codes.copy_(layer.codes.flip(0))
        agree(layer, x)


def test_two_python_threads_meet_a_new_shape_at_once():
    layer, x, wrong = make('conv3x3', 24, 16, 2, 9), torch.randn(2, 16, 8, 8), []
    got = [None]*4
    def work(i):
        try:
            with torch.no_grad():
                for _ in range(20): got[i] = layer(x)
        except BaseException as e: wrong.append(e)
    ts = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in ts: t.start()
    for t in ts: t.join()
    assert not wrong and all(torch.equal(got[0], g) for g in got)


# ---------------------------------------------------------------- weights that are kept

def keeping(kind='conv3x3', O=24, I=16):
    layer = make(kind, O, I, 2, 9 if kind == 'conv3x3' else 8)
    cpu.set_weight_cache(torch.nn.Sequential(layer), 10**6)
    return layer


def test_the_budget_is_a_quarter_and_is_kept(timed):
    timed.times.update(bytes=.1, cached=.2, fp32=.05)
    model = torch.nn.ModuleList(make(k, 96, 64, 2, 8, i) for i, k in enumerate(('linear', 'conv1x1', 'linear', 'linear')*3))
    for _ in range(4):
        for m in model: m(torch.randn(4, 64) if m.weight.dim() == 2 else torch.randn(1, 64, 4, 4))
    told, dense = cpu.weight_cache(model), sum(4*np.prod(m.weight_shape) for m in model)
    assert 0 < told['used'] <= told['budget'] and told['layers'] == len(model)
    assert cpu.cache_budget() >= dense//4


def test_memory_is_given_back_with_the_layer(timed):
    timed.times['bytes'] = .1
    layer = make('linear', 96, 64, 2, 8)
    for _ in range(3): layer(torch.randn(4, 64))
    assert cpu.weight_cache()['layers'] == 1
    del layer
    gc.collect()
    assert cpu.weight_cache() == dict(used=0, budget=0, layers=0)


@pytest.mark.parametrize('asked', ['0', '100'])
def test_no_room_no_weight(timed, monkeypatch, asked):
    monkeypatch.setenv('AQUATIC_WEIGHT_CACHE', asked)
    timed.times['bytes'] = .1
    layer, x = make('linear', 96, 64, 2, 8), torch.randn(4, 64)
    for _ in range(3): agree(layer, x)
    assert used(layer, x) not in ('bytes', 'cached') and cpu.weight_cache()['used'] == 0
    assert 'to keep' in cpu._own_bytes(layer, x)


def test_a_budget_that_is_no_number(monkeypatch):
    monkeypatch.setenv('AQUATIC_WEIGHT_CACHE', '1 GiB')
    with pytest.raises(ValueError, match="AQUATIC_WEIGHT_CACHE='1 GiB'"): cpu.cache_budget()


def test_a_kept_weight_is_nowhere_but_here():
    layer, x = keeping(), torch.randn(2, 16, 8, 8)
    before = make('conv3x3', 24, 16, 2, 9)
    for _ in range(3): layer(x)
    assert cpu.weight_cache()['used'] > 0
    assert list(layer.state_dict()) == list(before.state_dict())
    assert len(pickle.dumps(layer)) == len(pickle.dumps(before))
    other = copy.deepcopy(layer)
    assert id(other) not in cpu._views
    agree(other, x)


@pytest.mark.parametrize('dtype', ['int8', 'fp32', 'bf16'])
def test_a_kept_weight_has_the_scales_of_now(dtype, monkeypatch):
    monkeypatch.setattr(cpu, 'native_bfloat16', lambda: True)
    layer, x = make('conv3x3', 24, 16, 2, 9), torch.randn(2, 16, 8, 8)
    cpu.set_weight_cache(torch.nn.Sequential(layer), 10**6, dtype)
    layer.kernel = 'cached'
    first = layer(x)
    assert used(layer, x) == 'cached'
    layer.scales.mul_(4)
    layer.bias.mul_(4)
    torch.testing.assert_close(layer(x), 4*first, rtol=1e-5, atol=1e-5)


def test_bfloat16_only_where_it_is_native(monkeypatch):
    monkeypatch.setattr(cpu, 'native_bfloat16', lambda: False)
    with pytest.raises(ValueError, match='no bfloat16'): cpu.set_weight_cache(torch.nn.Sequential(), 1, 'bf16')


@pytest.mark.parametrize('bad', [-1, True, 1.5, '1'])
def test_a_cache_of_no_size(bad):
    with pytest.raises(ValueError, match='max_bytes'): cpu.set_weight_cache(torch.nn.Sequential(), bad)


@pytest.mark.parametrize('kind,shape', [('conv3x3', (2, 20, 7, 9)), ('stride2', (2, 20, 7, 9)), ('circular', (2, 20, 7, 9)),
                                        ('grouped', (2, 40, 7, 9)), ('conv1x1', (1, 24, 5, 5)), ('linear', (3, 24))])
def test_decoding_and_keeping_give_the_same_bits(kind, shape):
    layer = make(kind, 30, shape[1]//(2 if kind == 'grouped' else 1), 2, 9)
    x, got = torch.randn(shape), []
    for kernel, dtype in (('decode', None), ('cached', 'int8'), ('cached', 'fp32')):
        if dtype: cpu.set_weight_cache(torch.nn.Sequential(layer), 10**6, dtype)
        layer.kernel = kernel
        assert used(layer, x) == kernel
        got.append(layer(x))
    assert all(torch.equal(got[0], g) for g in got)


def test_codebooks_of_fp16_are_kept_as_float32_or_not_at_all():
    layer = make('linear', 30, 24, 2, 8, int8=False)
    assert cpu.set_weight_cache(torch.nn.Sequential(layer), 10**6, 'int8') == {}
    assert used(layer, torch.randn(3, 24)) not in ('bytes', 'cached')
    assert cpu.set_weight_cache(torch.nn.Sequential(layer), 10**6, 'fp32') == {'0': 30*24*4}
    agree(layer, torch.randn(3, 24), 'cached')


# ---------------------------------------------------------------- the kernels of this room and of 8 bits

@pytest.mark.parametrize('name', list(widths()))
@settings(max_examples=12, derandomize=True, **LOOSE)
@given(st.sampled_from(('conv3x3', 'conv1x1', 'linear', 'stride2')), st.integers(1, 70), st.integers(1, 40), st.integers(1, 3),
       st.integers(1, 12), st.integers(1, 21), st.integers(0, 999))
def test_bytes_against_float64_at_one_and_two_threads(name, kind, O, I, n, h, w, seed):
    layer, got = make(kind, O, I, 2, 8, seed), []
    cpu.set_weight_cache(torch.nn.Sequential(layer), 10**6) # room to keep it, whatever else is kept
    x = torch.randn((n, h, I) if kind == 'linear' else (n, I, h, w), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad(), use_width(name):
        for t in (1, 2):
            torch.set_num_threads(t)
            got.append(agree(layer, x, 'bytes'))
    assert torch.equal(*got)


@pytest.mark.parametrize('kind,shape', [('conv3x3', (2, 16, 9, 9)), ('conv1x1', (2, 16, 5, 5)), ('linear', (9, 16))])
def test_codewords_whose_largest_entries_do_not_meet(kind, shape):
    "What counts is the sum at one position: 100 in the first place and 100 in the second never add up."
    layer = make(kind, 24, 16, 2, 8)
    layer.codebooks.zero_()
    layer.codebooks[0, :, 0], layer.codebooks[1, :, 1] = 100, -100
    layer.codebooks[:, ::2] //= 2
    assert int8.reach(cpu.packed_of(layer)) == (-100, 100)
    for name in ('auto', 'bytes', 'cached'):
        layer.kernel = name
        agree(layer, torch.randn(shape))
    layer.act, layer.kernel = ranges(layer, 1, None, 8, 0), 'auto'
    agree(layer, torch.randn(shape))
    if KERNELS['int8'].supports(layer, torch.randn(shape)) is None or cpu._own_int8(layer, torch.randn(shape)) is None:
        agree(layer, torch.randn(shape), 'int8')


def test_a_weight_laid_out_for_one_width_is_laid_out_anew_for_another():
    layer, x = keeping('linear', 50, 24), torch.randn(3, 24)
    for name in list(widths())*2:
        with use_width(name): agree(layer, x)


# ---------------------------------------------------------------- what is told

def test_report_is_plain_and_names_the_width(monkeypatch):
    monkeypatch.delenv('AQUATIC_SIMD', raising=False)         # the tests may run with a width forced
    report = cpu.cpu_report()
    assert json.loads(json.dumps(report)) == report
    assert report['width'] == next(iter(widths())) and 'widest' in report['why']
    with use_width('portable'): assert 'forced' in cpu.cpu_report()['why']
    monkeypatch.setenv('AQUATIC_SIMD', 'portable')
    assert cpu.cpu_report()['width'] == 'portable'


def test_a_width_that_the_processor_lacks(monkeypatch):
    lacking = next(n for n in ('neon', 'avx512') if n not in widths())
    monkeypatch.setenv('AQUATIC_SIMD', lacking)
    with pytest.raises(ValueError, match=f"AQUATIC_SIMD='{lacking}': this processor lacks"): make('linear', 24, 16, 2, 8)(torch.randn(2, 16))


def test_explanation_has_times():
    model = torch.nn.Sequential(make('conv3x3', 24, 16, 2, 9))
    said = cpu.explain_kernels(model, torch.randn(2, 16, 8, 8))
    assert said.width.iloc[0] == width().name and 'decode' in said.microseconds.iloc[0]
    set_kernel(model, 'decode')
    assert cpu.explain_kernels(model, torch.randn(2, 16, 8, 8)).kernel.tolist() == ['decode']


def test_reference_is_the_simulation():
    "What the tests compare with is what the layer says it computes."
    layer, x = make('linear', 5, 16, 2, 8), torch.randn(3, 16)
    torch.testing.assert_close(reference(layer, x).float(), F.linear(x, layer.weight, layer.bias), rtol=1e-4, atol=1e-5)
