"What the rows of a call are: one for each sample, a list of samples, halves of guidance, three for each, or nothing that can be cut."
import aquatic_nb # noqa: F401  first: torchvision may lack its operators
import functools

import pytest
import torch
from diffusers import (DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, HeliosScheduler, KarrasVeScheduler, RePaintScheduler, ScoreSdeVeScheduler,
                       StableDiffusionInstructPix2PixPipeline, UNet2DModel)
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn

from aquatic_nb.calib import calibration_batches, execution_order
from aquatic_nb.core import Run, generator
from aquatic_nb.kaq import packable
from aquatic_nb.layers import packed_layers
from aquatic_nb.probe import Probe, split_points, step_weights, thinned
from aquatic_nb.quant import quantize
from aquatic_nb.walk import Recording, answer, as_calls, merge, record, record_inputs
from packed_models import fill, plain
from test_inputs import EMBEDS, IMAGE, Anything, pipeline

QUICK = dict(laq=False, beam=1, sweeps=1, progress=False)

class Rows(nn.Module):
    "Rows in a batch, in lists, or of films whose frames see each other; the answer in the same form."
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 16), nn.Linear(16, 4)
    def forward(self, x, t, context=None, num_frames=1, form='tensor'):
        if isinstance(x, list): y = [self.one(v, c.mean(), t[i]) for i, (v, c) in enumerate(zip(x, context))]
        else:
            films = x.reshape(-1, num_frames, *x.shape[1:])
            y = self.one(films - films.mean(1, keepdim=True)*(num_frames > 1), 0., t.reshape(-1, num_frames, 1, 1, 1) if t.dim() else t).reshape(x.shape)
        return dict(tensor=y, pair=(y, None), dictionary=dict(found=y))[form]
    def one(self, v, c, t): return self.b(torch.tanh(self.a(v + c + t/1000)))

NET = fill(Rows())

@st.composite
def forms(draw):
    "Calls of one kind, with the number of samples that each can be cut into."
    kind, g, made = draw(st.sampled_from(['batch', 'list', 'film'])), generator(draw(st.integers(0, 99)), 'rows'), []
    out = draw(st.sampled_from(['tensor', 'pair', 'dictionary']))
    for _ in range(draw(st.integers(1, 3))):
        n, frames = draw(st.integers(1, 4)), draw(st.integers(2, 3)) if kind == 'film' else 1
        x = torch.randn(n*frames, 3, 5, 4, generator=g)
        call = dict(x=list(x) if kind == 'list' else x, t=torch.randint(0, 1000, (n*frames,), generator=g), form=out)
        if kind == 'list': call['context'] = [torch.randn(draw(st.integers(1, 5)), 2, generator=g) for _ in range(n)]
        if kind == 'film': call['num_frames'] = frames
        made.append((call, 1 if kind == 'film' else n))
    return made

@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(forms())
def test_what_is_cut_is_answered_as_before(made):
    given, samples = [c for c, _ in made], [n for _, n in made]
    found = as_calls(NET, given)
    assert [c.samples for c in found] == samples
    with torch.no_grad():
        want = [answer(NET, c) for c in given]
        for call, y in zip(found, want):
            for i in range(call.samples): torch.testing.assert_close(answer(NET, call.take([i])), y if call.whole else y[i:i + 1])
        torch.testing.assert_close(torch.cat([answer(NET, j) for j, _ in merge(found)]), torch.cat(want))
    recorded = record_inputs(NET, lambda: [NET(**c) for c in given])
    assert [c.samples for c in recorded] == samples
    for c, y in zip(recorded, want): torch.testing.assert_close(c.out, y)
    assert set(execution_order(NET, found[0])) == set(packable(NET))
    few, points = thinned(Recording(found), 2), split_points(found)[1]
    assert sum(c.samples for c in few) <= 2*len(found) and all(torch.isfinite(torch.tensor(Probe(NET, points).by_step({'a': NET.a.weight*.9}))))

def test_they_quantize_with_the_defaults():
    for made in ([dict(x=[torch.randn(3, 5, 4) for _ in range(3)], t=torch.arange(3), context=[torch.ones(2, 2)]*3)]*2, dict(x=torch.randn(6, 3, 5, 4), t=torch.tensor(5), num_frames=3)):
        assert packed_layers(quantize(fill(Rows()), 12, calibration=made, beam=1, sweeps=1, progress=False))

@pytest.mark.parametrize('form', ['dict', 'pair', 'partial', 'object', 'list'])
def test_one_call_and_whatever_can_be_called(form):
    net, call = fill(Anything()), dict(sample=torch.randn(2, 3, 4), timestep=5)
    class Runs:
        def __call__(self): net(**call)
    given = dict(dict=call, pair=((), call), partial=functools.partial(net, **call), object=Runs(), list=[call])[form]
    assert packed_layers(quantize(net, 15, calibration=given, **QUICK))

def test_what_the_model_does_not_take_is_refused_before_any_work():
    net = fill(Anything())
    good = dict(sample=torch.randn(2, 3, 4), timestep=5)
    for bad in (dict(good, sample=torch.randn(2, 3, 7)), dict(good, sample=good['sample'].half()), dict(good, residuals=[torch.randn(5, 8)])):
        with pytest.raises(ValueError, match='entry 1 does not run in Anything.*RuntimeError.*give what'): quantize(net, 15, calibration=[good, bad], **QUICK)
    assert not packed_layers(net)

class Guides:
    "A pipeline without flags, whose rows are 1, 2 or 3 for each sample."
    def __init__(self, model, copies, flags): self.components, self.model, self.copies = dict(unet=model), model, copies; self.__dict__ |= flags
    def __call__(self, batch_size=1, num_inference_steps=2, guidance_scale=3., generator=None, output_type='np', return_dict=True):
        x = torch.randn(batch_size, 3, 8, 8, generator=generator)
        for t in range(num_inference_steps, 0, -1):
            first, *others = self.model(torch.cat([x]*self.copies), torch.tensor(100*t)).sample.chunk(self.copies)
            x = x - .1*(first + sum(guidance_scale*(o - first) for o in others))
        return (x,)

@pytest.mark.parametrize('copies, flags, guided', [(1, {}, False), (2, {}, True), (3, {}, False), (2, dict(do_classifier_free_guidance=False), False),
                                                   (2, dict(do_classifier_free_guidance=True, guidance_scale=3.), True)])
def test_pipelines_with_or_without_a_flag(copies, flags, guided):
    model = plain()
    calls = record(Guides(model, copies, flags), model, n=6, steps=3, batch=4, run=Run(progress=False))
    assert calls.samples == 6 and all((c.guidance_scale is not None) == guided for c in calls)
    end = calls.again(model=model)
    torch.testing.assert_close(end, torch.cat([r.end for r in calls.runs]))
    rest, points = split_points(calls)
    assert rest.samples == 5 and points.samples == 1 and step_weights(model, points).shape == (3,)
    silent = calls.again({1: torch.zeros_like(calls[1].out)})
    part = calls.take([1, 2])
    torch.testing.assert_close(part.again({1: torch.zeros_like(part[1].out)}) - end[[1, 2]], silent[[1, 2]] - end[[1, 2]], rtol=1e-3, atol=1e-4)

def test_pix2pix_with_the_defaults():
    pipe = pipeline(StableDiffusionInstructPix2PixPipeline, DDIMScheduler(), 8)
    calls = calibration_batches(pipe.unet, pipe, 2, 2, kwargs=EMBEDS | dict(image=IMAGE))
    assert calls[0].trajectory.tolist() == [0, 1]*3
    rest, points = split_points(calls)
    assert points.samples == 1 and points[0].samples == 3 and step_weights(pipe.unet, points).shape == (2,)

def with_scheduler(folder, save):
    save(folder/'scheduler')
    plain().save_pretrained(folder/'unet')
    return UNet2DModel.from_pretrained(folder/'unet')

@pytest.mark.parametrize('scheduler', [FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), DDPMScheduler(num_train_timesteps=3), KarrasVeScheduler(), RePaintScheduler(),
                                       HeliosScheduler(), ScoreSdeVeScheduler()], ids=lambda s: type(s).__name__)
def test_a_scheduler_walks_or_is_named(scheduler, tmp_path):
    model, odd = with_scheduler(tmp_path, scheduler.save_pretrained), isinstance(scheduler, (KarrasVeScheduler, HeliosScheduler, ScoreSdeVeScheduler))
    if not odd: assert all(c.out.isfinite().all() for c in calibration_batches(model, 'auto', 2)); return
    with pytest.raises(ValueError, match=f'{type(scheduler).__name__}.*its folder.*UNet2DModel.*record_inputs'): quantize(model, 8, **QUICK)

@pytest.mark.parametrize('text', ['', '[]', '{"_class_name": "DDIMScheduler", "num_train_timesteps": "many"}'])
def test_a_damaged_scheduler_is_named(text, tmp_path):
    def save(folder): folder.mkdir(); (folder/'scheduler_config.json').write_text(text)
    with pytest.raises(ValueError, match='(?s)scheduler_config.json.*get the file again'): quantize(with_scheduler(tmp_path, save), 8, **QUICK)
