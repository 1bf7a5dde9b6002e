"""Faults that once passed without a word: each has a test that failed then."""
import aquatic_nb # noqa: F401  first: torchvision may lack its operators
import copy, warnings

import numpy as np
import pytest
import torch
from scipy import optimize
from diffusers import DDIMScheduler, UNet2DConditionModel

from aquatic_nb import knapsack
from aquatic_nb.aq import Scheme
from aquatic_nb.calib import calibration_batches, own_scheduler
from aquatic_nb.core import Run
from aquatic_nb.kaq import packable
from aquatic_nb.layers import packed_layers
from aquatic_nb.menu import menu
from aquatic_nb.pack import WorkDir, encode_model
from aquatic_nb.quant import plan, quantize, quantize_unet
from aquatic_nb.tune.distill import Teacher
from aquatic_nb.walk import builtin_prompts, record
from packed_models import class_pipe, conditional

QUICK = dict(laq=False, sweeps=1, beam=2, progress=False)

@pytest.fixture(scope='module')
def dense(): return conditional()

@pytest.fixture(scope='module')
def batches(dense): return calibration_batches(dense, 'auto', n=4, steps=3)

def test_codebook_dtype_holds_under_laq(dense, batches):
    model = quantize_unet(copy.deepcopy(dense), 9, calibration=batches, codebook_dtype='fp16', sweeps=1, beam=2, progress=False)
    kinds = {m.scheme.codebook_dtype for m in packed_layers(model).values() if m.scheme.kind == 'aq'}
    assert kinds == {'fp16'}
    assert all(o.codebook_dtype == 'fp16' for o in menu(torch.nn.Linear(64, 64), codebook_dtype='fp16') if o != 'dense' and o.kind == 'aq')

def test_another_memory_is_another_run(dense, batches, tmp_path):
    "It changes the waves, and so the bytes."
    quantize(copy.deepcopy(dense), 6, calibration=batches, work_dir=tmp_path/'w', **QUICK)
    with pytest.raises(ValueError, match='another model or other settings'):
        quantize(copy.deepcopy(dense), 6, calibration=batches, work_dir=tmp_path/'w', memory=2**20, **QUICK)

def test_other_inputs_of_a_pipeline_are_another_run(tmp_path):
    "A pipeline was known to the folder by its type only."
    pipe = class_pipe()
    quantize(pipe.unet, 7, calibration=pipe, n_calibration=2, work_dir=tmp_path/'w', **QUICK)
    other = class_pipe()
    with torch.no_grad(): other.class_embedding.embedding.weight.mul_(2)
    with pytest.raises(ValueError, match='another model or other settings'):
        quantize(other.unet, 7, calibration=other, n_calibration=2, work_dir=tmp_path/'w', **QUICK)

def test_a_plan_says_what_measurement_decides(dense):
    told = plan(dense, 6, overrides={'conv_in': 8}, laq=True).set_index('layer').scheme
    assert told['conv_in'] == 'uniform8' and (told.drop('conv_in') == 'LAQ decides').all()

def test_an_override_keeps_the_other_layers(dense, tmp_path):
    schemes = {n: Scheme(2, 4, 9 if m.weight.dim() == 4 and m.weight.shape[-1] == 3 else 8) for n, m in packable(dense).items()}
    def files(): return {f.name: f.stat().st_mtime_ns for f in tmp_path.glob('*.safetensors')}
    def encode(schemes): return encode_model(dense, schemes, options=dict(beam=2, sweeps=1), work=WorkDir(tmp_path, 'x'), run=Run(progress=False))
    encode(schemes); before = files()
    changed = encode(schemes | {'conv_in': Scheme(1, 8, 1, kind='uniform')})
    assert [n for n in before if files()[n] != before[n]] == [WorkDir(tmp_path, 'x').file('conv_in').name]
    assert changed['conv_in'][0].scheme.kind == 'uniform'

def test_the_allocation_does_not_look_at_the_clock(monkeypatch):
    rng = np.random.default_rng(0)
    groups = [(np.sort(rng.choice(np.arange(10, 4000), 12, replace=False)), np.sort(10.**rng.uniform(-9, -1, 12))[::-1].copy()) for _ in range(30)]
    seen, real = [], optimize.milp
    monkeypatch.setattr(optimize, 'milp', lambda *a, **kw: (seen.append(dict(kw['options'])), real(*a, **kw))[1])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        one = knapsack._knapsack(groups, 20_000, nodes=1)
    assert all('time_limit' not in o and o['node_limit'] == 1 for o in seen)
    assert one == knapsack._knapsack(groups, 20_000, nodes=1)
    assert not said or any('not proved' in str(w.message) for w in said)

def test_auto_follows_the_scheduler_of_the_models_folder(dense, tmp_path):
    kind = DDIMScheduler(prediction_type='v_prediction', beta_schedule='linear')
    kind.save_pretrained(tmp_path/'scheduler'); dense.save_pretrained(tmp_path/'unet')
    model = UNet2DConditionModel.from_pretrained(tmp_path, subfolder='unet')
    found, told = own_scheduler(model)
    assert found.config.prediction_type == 'v_prediction' and 'its folder' in told
    by_v = calibration_batches(model, 'auto', n=2, steps=3)
    assert not torch.equal(by_v[-1]['sample'], calibration_batches(dense, 'auto', n=2, steps=3)[-1]['sample'])
    assert 'assumed' in own_scheduler(dense)[1]

def test_a_teacher_knows_all_of_its_weights(tmp_path):
    pipe = class_pipe()
    other = copy.deepcopy(pipe.unet)
    with torch.no_grad(): list(other.parameters())[-1].add_(1)
    make = lambda model: Teacher(pipe, model, 1, batch=2, steps=2, folder=tmp_path)
    make(pipe.unet).walk(0)
    with pytest.raises(ValueError, match='another model'): make(other).walk(0)

class Prompted:
    "A pipeline in little: text in, two calls of the denoiser, guidance in one batch."
    def __init__(self, unet): self.components, self.unet, self.asked = dict(unet=unet), unet, []
    guidance_scale, do_classifier_free_guidance = 5., True
    def __call__(self, prompt, num_inference_steps=2, guidance_scale=7., generator=None, output_type='pil', return_dict=True):
        self.asked.append((list(prompt), guidance_scale)); self.guidance_scale = guidance_scale
        x = torch.randn(len(prompt), 3, 8, 8, generator=generator)
        for t in range(num_inference_steps, 0, -1):
            both = torch.cat([torch.zeros(len(prompt), 1, 8), torch.tensor([[[float(len(p))]*8] for p in prompt])])
            null, cond = self.unet(torch.cat([x, x]), t, both).sample.chunk(2)
            x = x - .1*(null + guidance_scale*(cond - null))
        return (x,)

def test_prompts_and_guidance_reach_the_pipeline(dense):
    pipe = Prompted(dense)
    calls = record(pipe, dense, n=6, steps=2, guidance_scale=2., run=Run(progress=False))
    assert [p for asked, _ in pipe.asked for p in asked] == builtin_prompts()[:6] and {g for _, g in pipe.asked} == {2.}
    assert calls.samples == 6 and all(c.guidance_scale.tolist() == [2.]*c.samples for c in calls)
    mine = record(pipe, dense, n=3, prompts=['a', 'bb'], run=Run(progress=False))
    assert pipe.asked[-1][0] == ['a', 'bb', 'a'] and mine.samples == 3
    for bad in ('a text', [], ['fine', 3]):
        with pytest.raises(ValueError, match='calibration_prompts'): record(pipe, dense, prompts=bad, run=Run(progress=False))

def test_a_recorded_pipeline_runs_again(dense):
    calls = record(Prompted(dense), dense, n=3, steps=3, batch=3, run=Run(progress=False))
    end = calls.again(model=dense)
    torch.testing.assert_close(end, calls.runs[0].end)
    silent = calls.again({1: torch.zeros_like(calls[1].out)})
    assert not torch.allclose(silent, end)
    part = calls.take([1])
    torch.testing.assert_close(part.again({1: torch.zeros_like(part[1].out)})[0] - end[1], silent[1] - end[1], rtol=1e-3, atol=1e-4)
