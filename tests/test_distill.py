"The loop: exact resume, the clock, what can teach, what is kept and what is refused."
import copy
import math

import aquatic_nb # noqa: F401  first: diffusers imports torchvision
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, FlowMatchEulerDiscreteScheduler, UNet2DConditionModel, UNet2DModel

from aquatic_nb.act import attach_act, checkpoint_with_timestep
from aquatic_nb.aq import check_values
from aquatic_nb.layers import packed_layers
from aquatic_nb.tune.distill import (Pace, Teacher, TuneConfig, distill, distillation_loss, held_out_loss, iid_batch, tune_model,
                                     walk_batch)
from aquatic_nb.tune.layers import open_layers
from tuned_models import QUIET, SETUP, conditional, packed_copy, same, teacher_of, tuned, walks


@pytest.fixture(scope='module')
def unet(): return conditional()

@pytest.fixture(scope='module')
def packed(unet): return packed_copy(unet)

@pytest.fixture(scope='module')
def teacher(unet): return teacher_of(unet)

@pytest.fixture(scope='module')
def held(unet): return teacher_of(unet, 1, seed=9)


@pytest.mark.parametrize('kw', [dict(selector='A'), dict(selector='B'), dict(mode='iid'), dict(mode='iid', selector='C')])
def test_learns_and_stays_storable(packed, teacher, held, kw):
    before = held_out_loss(packed, held)
    model, log = tuned(packed, teacher, **(dict(mode='walk', steps=30, held=held, code_lr=.3, trust_ratio=.02) | kw))
    assert log[-1]['held'] < before and not any(p.requires_grad for p in model.parameters())
    layers = packed_layers(model)
    assert list(layers) == list(packed_layers(packed))
    for n, m in layers.items(): check_values(m.aq, n)
    kept = log[-1]['averaged'] if log[-1]['kept'] == 'averaged' else log[-1]['held']
    assert held_out_loss(model, held) == pytest.approx(kept, rel=1e-4)      # what was measured is what is stored


@pytest.mark.parametrize('kw', [dict(mode='walk', selector='A'), dict(selector='B', bf16_state=True), dict(selector='C')])
def test_killed_run_resumes_to_the_same_weights(packed, teacher, tmp_path, kw):
    kw = dict(kw, steps=30, code_betas=(.8, .9))
    whole, log = tuned(packed, teacher, **kw)
    assert sum(r['additive'] for r in log[:-1]) > 0

    class Killed(Exception): ...
    def die(run):
        if run.step == 17: raise Killed
        return {}
    path = tmp_path/'run.pt'
    with pytest.raises(Killed): tuned(packed, teacher, checkpoint=path, every_minutes=0, watch=die, **kw)
    assert path.exists()
    resumed, log = tuned(packed, teacher, checkpoint=path, **kw)
    assert len(log) == 31 and same(whole, resumed)


def test_an_interrupted_run_leaves_a_model_that_works(packed, teacher):
    model = copy.deepcopy(packed)
    def stop(run):
        if run.step == 3: raise KeyboardInterrupt
        return {}
    with pytest.raises(KeyboardInterrupt): distill(model, teacher, TuneConfig(**SETUP), run=QUIET, watch=stop)
    assert same(model, packed) and len(packed_layers(model)) == len(packed_layers(packed))


def test_activation_ranges_are_trained(packed, teacher):
    model = copy.deepcopy(packed)
    attach_act(model, 8, [_inputs(walk_batch(teacher, 0, 4, 0).calls[0])])
    before = {n: m.act.scale.clone() for n, m in packed_layers(model).items()}
    model, _ = tuned(model, teacher)
    assert sum(not torch.equal(m.act.scale, before[n]) for n, m in packed_layers(model).items()) > len(before)//2
    assert all((m.act.scale > 0).all() for m in packed_layers(model).values())

def _inputs(call): return {k: v.float() if v.dtype == torch.float16 else v for k, v in call.items()}


def test_checkpointing_keeps_the_timestep(packed, teacher):
    model = copy.deepcopy(packed)
    calls = [_inputs(walk_batch(teacher, j, 4, 0).calls[0]) for j in range(5)]
    attach_act(model, 8, calls)
    open_layers(model)
    grads = []
    for on in (False, True):
        if on: model.enable_gradient_checkpointing(checkpoint_with_timestep)
        model.train().zero_grad()
        model.conv_in.bias.requires_grad_(True)
        model(**calls[2]).sample.square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) and all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads))


# the loss, and what can teach

def test_the_loss_is_that_of_the_guided_answers(packed, teacher):
    batch = iid_batch(teacher, 3, 8, 0)
    assert sum(c.samples for c in batch.calls) == 8 and all(c.rows == 16 for c in batch.calls)
    want = 0.
    for i in range(8):
        c = batch.calls[0].take([i])
        null, cond = packed(**_inputs(c)).sample.chunk(2)
        t_null, t_cond = c.out.float().chunk(2)
        want += ((null + 1.5*(cond - null)) - (t_null + 1.5*(t_cond - t_null))).square().mean().item()/8
    assert distillation_loss(packed, batch).item() == pytest.approx(want, rel=1e-4)
    assert distillation_loss(packed, batch, weights=lambda t: 2*torch.ones_like(t)).item() == pytest.approx(2*want, rel=1e-4)


def test_the_same_step_draws_the_same_batch(teacher):
    for make in (walk_batch, iid_batch):
        a, b, other = (make(teacher, s, 4, 0).calls for s in (7, 7, 8))
        assert all(torch.equal(x['sample'], y['sample']) for x, y in zip(a, b)) and not torch.equal(a[0]['sample'], other[0]['sample'])


@pytest.mark.parametrize('kind', ['epsilon', 'v_prediction', 'sample', 'flow'])
def test_unconditional_pipelines_teach(kind, tmp_path):
    torch.manual_seed(1)
    model = UNet2DModel(sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
                        down_block_types=('DownBlock2D', 'DownBlock2D'), up_block_types=('UpBlock2D', 'UpBlock2D')).eval()
    flow = kind == 'flow'
    pipe = DDPMPipeline(model, FlowMatchEulerDiscreteScheduler() if flow else DDIMScheduler(prediction_type=kind, clip_sample=False))
    dense = copy.deepcopy(model)
    student = packed_copy(model)
    before = held_out_loss(student, Teacher(pipe, dense, 1, steps=4, seed=1))
    config = TuneConfig(steps=12, batch=4, lr=3e-3, warmup=2, bf16=False)
    assert tune_model(student, dense, pipe, config, run=QUIET) is student
    assert held_out_loss(student, Teacher(pipe, dense, 1, steps=4, seed=1)) < before


def test_ready_made_calls_teach(packed, unet, teacher):
    "Calls without answers: the dense model gives them."
    calls = [_inputs(c) for c in teacher.walk(0)]
    other = Teacher(calls, unet)
    assert other.n_walks == 1
    assert torch.allclose(other.walk(0)[1].out.float(), teacher.walk(0)[1].out.float(), atol=5e-3)
    model, log = tuned(packed, other, steps=12)
    assert log[-2]['loss'] < log[0]['loss']


def test_walks_are_kept_small_and_timesteps_exact():
    from aquatic_nb.tune.distill import _thick, _thin
    from aquatic_nb.walk import Call
    t = torch.tensor([999.123, 3.25])
    text = torch.randn(2, 5, 8)
    calls = [Call(dict(sample=torch.randn(2, 3, 4, 4, 4), timestep=t - i, encoder_hidden_states=text.clone(), deep=dict(ids=torch.arange(2.))),
                  torch.randn(2, 3, 4, 4, 4)) for i in range(3)]
    calls[1]['sample'][0, 0, 0, 0, 0] = 1e6                                       # beyond fp16
    back = _thick(_thin(calls))
    assert torch.equal(back[2]['timestep'], t - 2) and back[0]['sample'].dtype == torch.float16 and back[0].out.dtype == torch.float16
    assert back[1]['sample'].dtype == torch.float32 and back[0]['encoder_hidden_states'] is back[2]['encoder_hidden_states']
    assert torch.equal(back[1]['deep']['ids'], torch.arange(2.))


# the cache of the teacher

def test_teacher_cache(unet, teacher, tmp_path):
    disk = teacher_of(unet, folder=tmp_path)
    for a, b in zip(disk.walk(1), teacher.walk(1)): assert torch.equal(a['sample'], b['sample']) and torch.equal(a.out, b.out)
    again = teacher_of(unet, folder=tmp_path)
    again.make = None                                             # read, not made
    assert torch.equal(again.walk(1)[2]['sample'], teacher.walk(1)[2]['sample'])
    with pytest.raises(ValueError, match='other settings'): Teacher(walks(unet), unet, 3, steps=4, folder=tmp_path).walk(1)
    streamed = teacher_of(unet, limit_mb=0)
    assert torch.equal(streamed.walk(1)[0]['sample'], teacher.walk(1)[0]['sample']) and not streamed.kept


def test_a_teacher_that_differs_anywhere_is_another_teacher(unet, tmp_path):
    "The mark once looked at eight parameters; a change in any of the others went unseen."
    teacher_of(unet, folder=tmp_path).walk(0)
    for i in (0, len(list(unet.parameters()))//2, -1):
        other = copy.deepcopy(unet)
        list(other.parameters())[i].data.view(-1)[-1] += 1e-3
        with pytest.raises(ValueError, match='another model'): teacher_of(other, folder=tmp_path).walk(0)


def test_a_damaged_cache_is_named(unet, tmp_path):
    teacher_of(unet, folder=tmp_path).walk(0)
    path = tmp_path/'walk_0000.pt'
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match='walk_0000.pt'): teacher_of(unet, folder=tmp_path).walk(0)


def test_full_disk_is_named(unet, tmp_path):
    blocked = tmp_path/'file'
    blocked.write_text('not a folder')
    with pytest.raises(OSError, match='file'): teacher_of(unet, folder=blocked/'cache').walk(0)


# the clock

class FakeClock:
    "Seconds that pass only when a model is called: `each` a call of the teacher, three times as much a step."
    def __init__(self, each, later=None): self.now, self.each, self.later, self.calls = 0., each, later, 0
    def __call__(self): return self.now
    def tick(self, module, args, kwargs):
        self.calls += 1
        slow = self.later is not None and self.calls > self.later[0]
        self.now += (self.later[1] if slow else self.each)*(4 if module.training else 1)


def timed(packed, unet, minutes, each, later=None, **kw):
    clock, dense, model = FakeClock(each, later), copy.deepcopy(unet), copy.deepcopy(packed)
    for m in (dense, model): m.register_forward_pre_hook(clock.tick, with_kwargs=True)
    teacher, held = teacher_of(dense, 4), teacher_of(dense, 1, seed=9)
    config = TuneConfig(**({k: v for k, v in SETUP.items() if k != 'steps'} | dict(minutes=minutes) | kw))
    return model, distill(model, teacher, config, held, run=QUIET, clock=clock), clock


@pytest.mark.parametrize('each', [.3, .8])
def test_minutes_hold_on_fast_and_slow_machines(packed, unet, each):
    _, log, clock = timed(packed, unet, 2, each, code_lr=.3, trust_ratio=2e-3) # small moves: a tenth of the codes at once spoils so short a run
    assert 20 <= log[-1]['step'] == log[-1]['planned'] and 90 < clock.now < 130
    assert log[-1]['kept'] != 'start'


def test_minutes_hold_when_the_machine_becomes_slower(packed, unet):
    _, log, clock = timed(packed, unet, 2, .3, later=(100, 1.5))
    assert clock.now < 130 and log[-1]['step'] < log[-1]['planned']


@pytest.mark.parametrize('each', [2., 30.])
def test_a_machine_that_is_too_slow_is_told_so(packed, unet, each):
    with pytest.warns(UserWarning, match='too slow'): model, log, clock = timed(packed, unet, 2, each)
    assert same(model, packed) and clock.now <= 150 and log[-1]['kept'] == 'start'


def test_the_number_of_steps_and_the_seed_decide_the_result(packed, unet):
    "However fast the machine was: a run of N steps by the clock is a run of N steps."
    slow, log, _ = timed(packed, unet, 1, .3)
    again, _, _ = timed(packed, unet, 1, .3001)
    n = log[-1]['step']
    fixed = copy.deepcopy(packed)
    distill(fixed, teacher_of(unet, 4), TuneConfig(**(SETUP | dict(steps=n))), teacher_of(unet, 1, seed=9), run=QUIET)
    assert same(slow, fixed) and same(slow, again)


def test_a_killed_run_keeps_its_clock_and_its_number_of_steps(packed, teacher, tmp_path):
    class Killed(Exception): ...
    def die(run):
        if run.pace.total is not None: raise Killed
        return {}
    clock = FakeClock(0.)
    def watch(run): clock.now += 1.; return {}
    def both(run): watch(run); return die(run)
    kw = dict(minutes=1, checkpoint=tmp_path/'run.pt', every_minutes=0, clock=clock)
    with pytest.raises(Killed): tuned(packed, teacher, watch=both, **kw)
    kept = torch.load(tmp_path/'run.pt', weights_only=True)
    assert 35 <= kept['spent'] <= 38
    clock.now = 1e6
    _, log = tuned(packed, teacher, watch=watch, **kw)
    assert 55 <= log[-1]['seconds'] <= 62 and log[-1]['step'] == log[-1]['planned'] == pytest.approx(60, abs=2)


def test_pace_of_a_fixed_number_of_steps_and_of_minutes_agree():
    for k in range(1, 200):
        now = [0.]
        pace = Pace(minutes=1, warmup=3, clock=lambda: now[0])
        factors, step = [], 0
        while pace.goes_on(step): factors.append(pace.factor(step)); step += 1; now[0] += 60/(k + .5)
        fixed = Pace(steps=pace.total, warmup=3)
        assert step == pace.total and factors == [fixed.factor(i) for i in range(step)]
        assert factors[-1] < .6 and all(b <= a for a, b in zip(factors[3:], factors[4:])) or step < 5


# bad input

def test_nonfinite_loss_names_step_and_layer_and_keeps_the_checkpoint(packed, teacher, tmp_path):
    path = tmp_path/'run.pt'
    def spoil(run):
        if run.step == 3: run.student.mid_block.resnets[0].conv1.scales.data[0] = math.nan
        return {}
    with pytest.raises(FloatingPointError, match=r'step 4.*mid_block\.resnets\.0\.conv1'):
        tuned(packed, teacher, checkpoint=path, every_minutes=0, watch=spoil)
    assert torch.load(path, weights_only=True)['step'] <= 4


def test_what_cannot_teach_is_refused(packed, teacher, unet):
    other = UNet2DConditionModel(sample_size=4, in_channels=3, out_channels=3, down_block_types=('DownBlock2D',), up_block_types=('UpBlock2D',),
                                 block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, cross_attention_dim=16)
    with pytest.raises(ValueError, match='student'): distill(packed_copy(other), teacher, TuneConfig(steps=2), run=QUIET)
    with pytest.raises(ValueError, match='no packed layers'): distill(copy.deepcopy(unet), teacher, TuneConfig(steps=2), run=QUIET)
    with pytest.raises(TypeError, match='str'): Teacher('unet', unet)
    pipe = DDPMPipeline(UNet2DModel(sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
                                    down_block_types=('DownBlock2D',)*2, up_block_types=('UpBlock2D',)*2), DDIMScheduler())
    with pytest.raises(ValueError, match='steps'): TuneConfig()
    for bad in (0, -1, True, 'x'):
        with pytest.raises(ValueError, match='minutes'): TuneConfig(minutes=bad)
    with pytest.raises(ValueError, match='backwards'): TuneConfig(steps=3, mode='backwards')
    assert pipe is not None


def test_a_checkpoint_of_other_settings_is_refused(packed, teacher, tmp_path):
    tuned(packed, teacher, steps=2, checkpoint=tmp_path/'run.pt')
    with pytest.raises(ValueError, match='another TuneConfig'): tuned(packed, teacher, steps=3, checkpoint=tmp_path/'run.pt')
