"""`quantize_unet` as a user meets it: bits that add up, runs that can be killed, messages that name what is wrong."""
import aquatic_nb # noqa: F401  first: torchvision may lack its operators
import copy, errno, math, os
from dataclasses import replace

import pytest
import torch
from diffusers import ConfigMixin, ModelMixin, UNet2DConditionModel, UNet2DModel
from diffusers.configuration_utils import register_to_config

from aquatic_nb import core, quant
from aquatic_nb.aq import Scheme, stored_bytes
from aquatic_nb.calib import calibration_batches
from aquatic_nb.kaq import packable
from aquatic_nb.layers import packed_layers
from aquatic_nb.quant import plan, preset_settings, quant_report, quantize_unet
from packed_models import conditional, plain

@pytest.fixture(scope='module')
def dense(): return conditional()

@pytest.fixture(scope='module')
def batches(dense): return calibration_batches(dense, 'auto', n=4, steps=3)

def quantized(dense, bits=6, **kw):
    return quantize_unet(copy.deepcopy(dense), bits, **({'laq': False, 'sweeps': 1, 'beam': 2, 'progress': False} | kw))

def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for n in a: assert torch.equal(a[n], b[n]), n

@pytest.mark.parametrize('bits', [5, 6.37, 9])
def test_bits_are_what_is_stored(dense, bits):
    model = quantized(dense, bits, calibration=None)
    report, layers = quant_report(model), packed_layers(model)
    weights = sum(m.weight.numel() for m in packable(dense).values())
    stored = sum(stored_bytes(m.scheme, m.weight_shape) for m in layers.values()) + sum(4*m.weight.numel() for m in packable(model).values())
    on_layers = sum(p.nbytes for m in layers.values() for n in m._stored if (p := getattr(m, n)) is not None)
    assert report.attrs['bits'] == pytest.approx(8*stored/weights) and report.attrs['bits'] <= bits
    assert report.attrs['weights'] == weights and on_layers == sum(m.aq.nbytes for m in layers.values())
    assert report.attrs['parameters'] == sum(p.numel() for p in dense.parameters())

def test_a_plan_is_kept(dense):
    planned = plan(dense, 6).set_index('layer').scheme
    report = quant_report(quantized(dense, calibration=None)).set_index('layer').scheme
    assert (planned[report.index] == report).all()

@pytest.mark.parametrize('laq', [False, True])
def test_same_seed_same_bytes_at_any_thread_count(dense, batches, laq):
    before, found = torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            found.append(quantized(dense, laq=laq, calibration=batches, workers=n))
    finally: torch.set_num_threads(before)
    same(*found)
    if not laq: assert any(not torch.equal(a.codes_hi if a.codes is None else a.codes, b.codes_hi if b.codes is None else b.codes) for a, b in
               zip(packed_layers(found[0]).values(), packed_layers(quantized(dense, calibration=batches, seed=1)).values()) if a.scheme.kind == 'aq')

class Killed(Exception): pass

@pytest.mark.parametrize('after', [1, 7])
def test_a_broken_run_goes_on_to_the_same_bytes(dense, batches, tmp_path, monkeypatch, after):
    whole = quantized(dense, calibration=batches)
    from aquatic_nb.quant import WorkDir
    put, count = WorkDir.put, []
    def dying(self, *a):
        if len(count) == after: raise Killed
        count.append(1); put(self, *a)
    monkeypatch.setattr(WorkDir, 'put', dying)
    with pytest.raises(Killed): quantized(dense, calibration=batches, work_dir=tmp_path/'w')
    monkeypatch.setattr(WorkDir, 'put', put)
    files = sorted((tmp_path/'w').glob('*.safetensors'))
    assert len(files) == after
    files[0].write_bytes(files[0].read_bytes()[:100])          # and one of them damaged
    same(whole, quantized(dense, calibration=batches, work_dir=tmp_path/'w'))

def test_a_full_disk_is_named_and_spares_what_is_done(dense, tmp_path, monkeypatch):
    real, count = os.fsync, []
    def full(fd):
        count.append(1)
        if len(count) > 6: raise OSError(errno.ENOSPC, 'No space left on device')
        real(fd)
    monkeypatch.setattr(core.os, 'fsync', full)
    with pytest.raises(OSError, match='No space left') as e: quantized(dense, calibration=None, work_dir=tmp_path/'w')
    assert str(tmp_path) in str(e.value)
    monkeypatch.setattr(core.os, 'fsync', real)
    done = list((tmp_path/'w').glob('*.safetensors'))
    assert done and not list((tmp_path/'w').glob('*.tmp'))
    same(quantized(dense, calibration=None), quantized(dense, calibration=None, work_dir=tmp_path/'w'))

def test_a_run_killed_at_its_first_file_goes_on(dense, tmp_path):
    (tmp_path/'w').mkdir()
    (tmp_path/'w'/'.run.json.abc123.tmp').write_bytes(b'{"finger')
    same(quantized(dense, calibration=None), quantized(dense, calibration=None, work_dir=tmp_path/'w'))

def test_a_work_dir_of_something_else_is_refused(dense, tmp_path):
    quantized(dense, calibration=None, work_dir=tmp_path/'w')
    kept = {f: f.read_bytes() for f in (tmp_path/'w').iterdir()}
    with pytest.raises(ValueError, match='another model or other settings'): quantized(dense, calibration=None, seed=1, work_dir=tmp_path/'w')
    with pytest.raises(ValueError, match='another model or other settings'): quantized(dense, calibration=calibration_batches(dense, 'auto', n=2, steps=2, seed=1), work_dir=tmp_path/'w')
    with pytest.raises(ValueError, match='another model or other settings'): quantized(conditional(seed=5), calibration=None, work_dir=tmp_path/'w')
    assert kept == {f: f.read_bytes() for f in (tmp_path/'w').iterdir()}
    (tmp_path/'notes').mkdir(); (tmp_path/'notes'/'mine.txt').write_text('mine')
    with pytest.raises(ValueError, match='files of something else'): quantized(dense, calibration=None, work_dir=tmp_path/'notes')

@pytest.mark.parametrize('laq', [False, True])
def test_a_work_dir_serves_other_bits(tmp_path, laq):
    "One table and the layers that keep their setting; the bytes are those of a run of its own."
    dense = UNet2DModel(sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4,
                        down_block_types=('DownBlock2D',), up_block_types=('UpBlock2D',), add_attention=False).eval()
    how = dict(calibration='auto', n_calibration=4, laq=laq)
    quantized(dense, 8.5, work_dir=tmp_path/'w', **how)
    tables = {f: f.stat().st_mtime_ns for f in (tmp_path/'w').rglob('laq_*.csv')}
    for bits in (7.5, 8.5): same(quantized(dense, bits, **how), quantized(dense, bits, work_dir=tmp_path/'w', **how))
    assert tables == {f: f.stat().st_mtime_ns for f in (tmp_path/'w').rglob('laq_*.csv')} and bool(tables) is laq

def test_overrides(dense):
    model = quantized(dense, 7, calibration=None, overrides={'mid_block*': 8, '*to_q': (2, 4), 'conv_out': 'dense', '*to_v': Scheme(1, 5, 8, 'fp16')})
    layers = packed_layers(model)
    assert 'conv_out' not in layers
    for n, m in layers.items():
        if n.endswith('to_q'): assert (m.scheme.n_codebooks, m.scheme.codebook_bits) == (2, 4), n
        elif n.endswith('to_v'): assert m.scheme == Scheme(1, 5, 8, 'fp16'), n
        elif n.startswith('mid_block'): assert m.scheme == Scheme(1, 8, 1, kind='uniform'), n

BAD = [(dict(bits=0), 'bits=0'), (dict(bits='2'), "bits='2'"), (dict(bits=.3, calibration=None), 'nearest possible'), (dict(act_bits=7), 'act_bits=7'), (dict(beam=0), 'beam=0'), (dict(memory=0), 'memory=0'),
       (dict(overrides={'nothing*': 8}, calibration=None), 'matches no'), (dict(overrides={'conv_in': 'three'}, calibration=None), "'conv_in' is set to 'three'"), (dict(calibration=[]), 'non-empty list'),
       (dict(calibration=None, act_bits=8), 'needs calibration'), (dict(tune=1.), 'tune needs')]

@pytest.mark.parametrize('kw,message', BAD, ids=[m for _, m in BAD])
def test_bad_arguments_are_named(dense, kw, message):
    model = copy.deepcopy(dense)
    with pytest.raises(ValueError, match=message): quantize_unet(model, **({'laq': False, 'progress': False} | kw))
    same(model, dense)

def test_bad_models_are_named(dense):
    with pytest.raises(TypeError, match='expected a torch.nn.Module'): quantize_unet('a path', 2)
    with pytest.raises(ValueError, match='no convolution or linear layer'): quantize_unet(torch.nn.Sequential(torch.nn.GELU()), 2)
    broken = copy.deepcopy(dense)
    broken.mid_block.resnets[0].conv1.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"'mid_block.resnets.0.conv1': the weight holds NaN"): quantize_unet(broken, 2, progress=False)
    with pytest.raises(ValueError, match='already quantized'): quantize_unet(quantized(dense, calibration=None), 2)
    with torch.device('meta'): ghost = UNet2DConditionModel.from_config(dense.config)
    with pytest.raises(ValueError, match='meta device'): quantize_unet(ghost, 2)

class Two(ModelMixin, ConfigMixin):
    "A model of which one half is never used."
    @register_to_config
    def __init__(self):
        super().__init__()
        self.used, self.never = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)
    def forward(self, sample): return self.used(sample)

def test_layers_that_never_run_and_models_of_another_kind():
    model = quantize_unet(plain(), 6, laq=False, sweeps=1, n_calibration=2, progress=False)   # unconditional: calibrated on its own configuration
    with torch.no_grad(): assert torch.isfinite(model(torch.zeros(1, 3, 8, 8), 5).sample).all()
    two = Two()
    out = quantize_unet(two, 9, laq=False, calibration=[dict(sample=torch.randn(64, 16, generator=core.generator(0, 'x')))], progress=False)
    assert set(packed_layers(out)) == {'used', 'never'}


def test_presets_fill_what_was_not_given(dense):
    fast, default, best = (preset_settings(o, 10) for o in ('fast', 'default', 'best'))
    for name in ('beam', 'sweeps', 'n_calibration'): assert fast[name] < default[name] < best[name]
    assert fast['sequential'] and not preset_settings('default', 10**9)['sequential'] and preset_settings('default', 10**9, 'cuda:0')['sequential']
    assert preset_settings('fast', 10, beam=5, sequential=True) == fast | dict(beam=5, sequential=True)
    assert preset_settings('default', 10**9)['n_calibration'] == default['n_calibration']//8
    assert [preset_settings(o, 10**9)['measure'] for o in ('fast', 'default', 'best')] == ['cheap', 'cheap', best['measure']] != ['cheap']*3
    with pytest.raises(ValueError, match="preset='quick', expected one of 'fast', 'default', 'best'"):
        quantize_unet(copy.deepcopy(dense), 3, preset='quick')

def test_given_arguments_count_for_more_than_the_preset(dense, batches):
    given = dict(calibration=batches, n_calibration=4, sequential=True)
    same(quantized(dense, **given), quantized(dense, preset='fast', **given))

@pytest.mark.parametrize('preset', ['fast', 'best'])
def test_presets_keep_to_the_bits_and_resume(dense, batches, preset, tmp_path):
    kw = dict(laq=True, preset=preset, calibration=batches, beam=None, sweeps=None)
    one, other = quantized(dense, **kw, work_dir=tmp_path), quantized(dense, **kw, work_dir=tmp_path)
    same(one, other)
    assert quant_report(one).attrs['bits'] <= 6

def job_of(dense, batches, **kw):
    how = preset_settings('default', 10, **kw)

    s = quant._Settings(bits=2, laq=True, guidance_scale=None, codebook_dtype='int8', act_bits=None, tune=None, seed=0, memory=2**32, **how)
    return quant._Job(dense, s, batches, {}, {}, core.Run())

def test_expected_minutes_grow_with_the_work(dense, batches):
    from aquatic_nb.walk import as_calls
    calls = as_calls(dense, batches)
    job = job_of(dense, batches)
    found = job.expected(calls, job.settings)
    assert set(found) == {'sensitivity', 'moments and codes'} and min(found.values()) > 0
    more = job.expected(calls, replace(job.settings, tune=3., act_bits=8, measure='thorough'))
    assert more['tuning'] == 180 and more['activations'] > 0
    less = job.expected(calls, replace(job.settings, laq=False))
    assert set(less) == {'moments and codes'}

def test_a_long_run_says_so_before_it_begins(dense, batches, capsys, monkeypatch):
    job = job_of(dense, batches)
    seconds = lambda self, calls, s: {'sensitivity': 300. if s.measure is None else 10., 'moments and codes': 100.}
    monkeypatch.setattr(quant._Job, 'expected', seconds)
    job.announce(batches)
    assert capsys.readouterr().err == ''                              # too small to be worth the timing
    monkeypatch.setattr(quant, 'packable', lambda model: {'x': torch.nn.Linear(2000, 2000)})
    job.announce(batches)
    said = capsys.readouterr().err
    assert "about 7 minutes here (sensitivity 5.0, moments and codes 1.7); with preset='fast' about 2" in said
