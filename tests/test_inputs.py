"Calibration inputs of every form that a dense model accepts, and the default call on every kind of model and pipeline."
import aquatic_nb # noqa: F401  first: torchvision may lack its operators
import copy

import pytest
import torch
from diffusers import (AutoencoderKL, ControlNetModel, DDIMScheduler, DiffusionPipeline, DiTTransformer2DModel, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler,
                       FluxTransformer2DModel, PixArtTransformer2DModel, PNDMScheduler, PriorTransformer, SD3Transformer2DModel, StableDiffusionControlNetPipeline, StableDiffusionImg2ImgPipeline,
                       StableDiffusionInpaintPipeline, StableDiffusionInstructPix2PixPipeline, StableDiffusionPipeline, UNet2DConditionModel, UNet2DModel)
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn

from aquatic_nb import quant
from aquatic_nb.calib import calibration_batches, execution_order, input_moments, never_run
from aquatic_nb.core import generator
from aquatic_nb.kaq import packable
from aquatic_nb.layers import packed_layers
from aquatic_nb.quant import quantize, quant_report
from aquatic_nb.probe import thinned
from aquatic_nb.tune.distill import Teacher
from aquatic_nb.walk import Recording, answer, as_calls, merge, record_inputs
from packed_models import fill, plain

QUICK = dict(laq=False, beam=1, sweeps=1, progress=False)

# ---- A: forms of input ----

class Anything(nn.Module):
    "Takes what denoisers take, in all the shapes that they take it."
    def __init__(self):
        super().__init__()
        self.proj, self.time, self.cond, self.place = nn.Linear(4, 8), nn.Linear(1, 8), nn.Linear(3, 8), nn.Linear(2, 8)
        self.out = nn.Linear(8, 4)
    def forward(self, sample, timestep=None, residuals=None, added=None, img_ids=None, flag=True):
        h = self.proj(sample.flatten(2).transpose(1, 2)) if sample.dim() > 3 else self.proj(sample)
        if timestep is not None:
            t = torch.as_tensor(timestep, dtype=torch.float32).reshape(-1, 1).expand(len(sample), 1) if torch.as_tensor(timestep).numel() in (1, len(sample)) else None
            h = h + self.time(t)[:, None]
        for r in (residuals or ()): h = h + r[:, None]
        if added is not None and added.get('text') is not None: h = h + self.cond(added['text'])[:, None]
        if img_ids is not None: h = h + self.place(img_ids)
        return self.out(torch.tanh(h))

@st.composite
def calls(draw):
    "A list of one form of call, with 1 to 4 rows each; the number of tokens may equal that of rows."
    n_calls, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    form = dict(time=draw(st.sampled_from([None, 'number', '0-d', '[1]', '[batch]', 'float'])), residuals=draw(st.sampled_from([None, 'list', 'tuple'])),
                added=draw(st.sampled_from([None, 'empty', 'text'])), ids=draw(st.booleans()), pair=draw(st.booleans()), maps=draw(st.booleans()))
    g, made = generator(draw(st.integers(0, 1000)), 'form'), []
    rand = lambda *s: torch.randn(s, generator=g)
    ids = rand(tokens, 2)
    for i in range(n_calls):
        n, t = draw(st.integers(1, 4)), 37*i + 5
        call = dict(sample=rand(n, 4, tokens, 1) if form['maps'] else rand(n, tokens, 4))
        if form['time']: call['timestep'] = {'number': t, '0-d': torch.tensor(t), '[1]': torch.tensor([t]), '[batch]': torch.arange(t, t + n), 'float': t + .5}[form['time']]
        if form['residuals']: call['residuals'] = (list if form['residuals'] == 'list' else tuple)([rand(n, 8), rand(n, 8)])
        if form['added']: call['added'] = dict(text=rand(n, 3) if form['added'] == 'text' else None, size=None)
        if form['ids']: call['img_ids'] = ids
        made.append(((), call) if form['pair'] and not draw(st.booleans()) else ((call.pop('sample'),), call) if form['pair'] else call)
    return made

NET = fill(Anything())

def direct(given):
    "What the dense model answers to each call, by itself."
    with torch.no_grad(): return [NET(*o[0], **o[1]) if isinstance(o, tuple) else NET(**o) for o in given]

@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(calls())
def test_every_form_is_kept_cut_and_joined(given):
    "A call, any of its rows, and calls put below each other are answered as the model answers by itself."
    want, found = direct(given), as_calls(NET, given)
    with torch.no_grad():
        for call, y in zip(found, want):
            torch.testing.assert_close(NET(**call), y)
            assert call.rows == len(y)
            for i in range(call.samples): torch.testing.assert_close(NET(**call.take([i])), y[i:i + 1])
        for joined, spans in merge(found, 5):
            assert sum(b - a for a, b in spans) == joined.samples
        torch.testing.assert_close(torch.cat([NET(**j) for j, _ in merge(found, 5)]), torch.cat(want))
    recorded = record_inputs(NET, lambda: direct(given))
    assert len(recorded) == len(given)
    for c, y in zip(recorded, want): torch.testing.assert_close(c.out, y)
    few = thinned(Recording(found), 2)
    with torch.no_grad():
        for c in few: assert 1 <= c.samples <= 2 and len(NET(**c)) == c.samples
    assert set(execution_order(NET, found[0])) == set(packable(NET))
    moments = input_moments(NET, found, ['proj'], workers=1)['proj']
    rows = torch.cat([c['sample'].flatten(2).transpose(1, 2).reshape(-1, 4) if c['sample'].dim() > 3 else c['sample'].reshape(-1, 4) for c in found])
    torch.testing.assert_close(moments.H, rows.T @ rows/len(rows), rtol=1e-4, atol=1e-5)

@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(calls(), st.booleans())
def test_every_form_quantizes(given, laq):
    net = copy.deepcopy(NET)
    quantize(net, 15, calibration=given, **QUICK | dict(laq=laq))
    for o, y in zip(given, direct(given)):
        with torch.no_grad(): got = net(*o[0], **o[1]) if isinstance(o, tuple) else net(**o)
        assert (got - y).pow(2).mean() < .05*y.pow(2).mean() + 1e-6

# ---- B: kinds of model, with default settings or recorded calls ----

def flux():
    model = FluxTransformer2DModel(patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=8, pooled_projection_dim=8,
                                   axes_dims_rope=(4, 4, 8), guidance_embeds=False)
    g = generator(0, 'flux')
    return model, lambda t: dict(hidden_states=torch.randn(2, 9, 4, generator=g), encoder_hidden_states=torch.randn(2, 9, 8, generator=g), pooled_projections=torch.randn(2, 8, generator=g),
                                 timestep=torch.full((2,), t/1000), img_ids=torch.zeros(9, 3), txt_ids=torch.zeros(9, 3))

def pixart():
    model = PixArtTransformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=8, patch_size=2, cross_attention_dim=16,
                                     caption_channels=12, use_additional_conditions=False, num_embeds_ada_norm=1000)
    g = generator(0, 'pixart')
    return model, lambda t: dict(hidden_states=torch.randn(2, 4, 8, 8, generator=g), encoder_hidden_states=torch.randn(2, 5, 12, generator=g), timestep=torch.full((2,), t),
                                 added_cond_kwargs=dict(resolution=None, aspect_ratio=None))

def sd3():
    model = SD3Transformer2DModel(sample_size=8, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=8, caption_projection_dim=16,
                                  pooled_projection_dim=8, out_channels=4, pos_embed_max_size=8)
    g = generator(0, 'sd3')
    return model, lambda t: dict(hidden_states=torch.randn(2, 4, 8, 8, generator=g), encoder_hidden_states=torch.randn(2, 5, 8, generator=g), pooled_projections=torch.randn(2, 8, generator=g),
                                 timestep=torch.full((2,), t))

def prior():
    model = PriorTransformer(num_attention_heads=2, attention_head_dim=8, num_layers=1, embedding_dim=8, num_embeddings=5, additional_embeddings=4)
    g = generator(0, 'prior')
    return model, lambda t: dict(hidden_states=torch.randn(2, 8, generator=g), timestep=t, proj_embedding=torch.randn(2, 8, generator=g), encoder_hidden_states=torch.randn(2, 5, 8, generator=g))

def vae():
    model = AutoencoderKL(block_out_channels=(16, 16), norm_num_groups=4, down_block_types=('DownEncoderBlock2D',)*2, up_block_types=('UpDecoderBlock2D',)*2, layers_per_block=1)
    g = generator(0, 'vae')
    return model, lambda t: dict(sample=torch.randn(2, 3, 16, 16, generator=g))

MODELS = dict(flux=flux, pixart=pixart, sd3=sd3, prior=prior, vae=vae)

@pytest.mark.parametrize('name', MODELS)
def test_models_of_every_kind(name):
    "The default works or is refused in one sentence; their own inputs, recorded or listed, work."
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    model.eval()
    lists = [inputs(t) for t in (900, 500, 100)]
    with torch.no_grad(): want = model(**lists[1])[0]
    if name == 'pixart': assert packed_layers(quantize(MODELS[name]()[0], 8.5, **QUICK | dict(n_calibration=1)))
    else:
        lacking = dict(flux='encoder_hidden_states', sd3='encoder_hidden_states', prior='proj_embedding', vae='takes no timestep')[name]
        with pytest.raises(ValueError, match=f'({lacking}.*{type(model).__name__}|{type(model).__name__}.*{lacking}).*record_inputs'):
            quantize(MODELS[name]()[0], 8.5, **QUICK | dict(n_calibration=1))
    assert len(record_inputs(model, lambda: [model(**o) for o in lists])) == 3
    quantize(model, 8.5, calibration=lists, **QUICK | dict(laq=name in ('flux', 'vae')))
    with torch.no_grad(): got = model(**lists[1])[0]
    assert packed_layers(model) and quant_report(model).attrs['bits'] <= 8.5
    assert (got - want).pow(2).mean() < .02*want.pow(2).mean()

def unet(channels=4, **kw):
    return fill(UNet2DConditionModel(sample_size=8, in_channels=channels, out_channels=4, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=8,
        attention_head_dim=4, down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D'), up_block_types=('CrossAttnUpBlock2D', 'UpBlock2D'), **kw))

def small_vae(): return fill(AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, layers_per_block=1, latent_channels=4, scaling_factor=1., down_block_types=('DownEncoderBlock2D',), up_block_types=('UpDecoderBlock2D',)))

def pipeline(cls, scheduler, channels=4, **parts):
    pipe = cls(vae=small_vae(), text_encoder=None, tokenizer=None, unet=unet(channels), scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe

EMBEDS = dict(prompt_embeds=torch.randn(2, 3, 8, generator=generator(0, 'p')), negative_prompt_embeds=torch.randn(2, 3, 8, generator=generator(0, 'n')))
TEXT = dict(calibration_kwargs=EMBEDS, n_calibration=2)

@pytest.mark.parametrize('scheduler', [DDIMScheduler(prediction_type='v_prediction'), EulerDiscreteScheduler(), EulerAncestralDiscreteScheduler()], ids=lambda s: type(s).__name__)
def test_pipelines_with_any_scheduler(scheduler):
    pipe = pipeline(StableDiffusionPipeline, scheduler)
    quantize(pipe.unet, 8.5, calibration=pipe, **TEXT, **QUICK)
    assert packed_layers(pipe.unet) and torch.isfinite(pipe(**EMBEDS, num_inference_steps=2, output_type='latent').images).all()

@pytest.mark.parametrize('scheduler', [FlowMatchEulerDiscreteScheduler(), EulerDiscreteScheduler(), DDIMScheduler(prediction_type='v_prediction')], ids=lambda s: type(s).__name__)
def test_a_folder_with_its_own_scheduler(scheduler, tmp_path):
    "'auto' walks by the scheduler that lies beside the model."
    scheduler.save_pretrained(tmp_path/'scheduler')
    plain().save_pretrained(tmp_path/'unet')
    model = UNet2DModel.from_pretrained(tmp_path/'unet')
    found = calibration_batches(model, 'auto', 2, 4)
    assert len(found) == 4 and all(c.out.isfinite().all() for c in found)
    assert packed_layers(quantize(model, 8.5, n_calibration=2, **QUICK))

def test_a_dit_of_classes_is_walked():
    model = fill(DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=8, num_embeds_ada_norm=10, patch_size=2, norm_num_groups=4))
    assert packed_layers(quantize(model, 8.5, n_calibration=2, **QUICK))

IMAGE, MASK = torch.rand(2, 3, 8, 8, generator=generator(0, 'image')), (torch.rand(2, 1, 8, 8, generator=generator(0, 'mask')) > .5).float()

def controlnet():
    return fill(ControlNetModel(in_channels=4, block_out_channels=(8, 16), down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D'), cross_attention_dim=8, attention_head_dim=4, norm_num_groups=4,
                                layers_per_block=1, conditioning_embedding_out_channels=(4,)))

PIPES = dict(img2img=(StableDiffusionImg2ImgPipeline, 4, {}, dict(image=IMAGE)), inpaint=(StableDiffusionInpaintPipeline, 9, {}, dict(image=IMAGE, mask_image=MASK, height=8, width=8)),
             pix2pix=(StableDiffusionInstructPix2PixPipeline, 8, {}, dict(image=IMAGE)), controlnet=(StableDiffusionControlNetPipeline, 4, dict(controlnet=controlnet), dict(image=IMAGE)))

@pytest.mark.parametrize('name', PIPES)
def test_pipelines_that_need_images(name):
    "They are taken with what they need, and refused in one sentence, before any work, without."
    cls, channels, parts, needs = PIPES[name]
    pipe = pipeline(cls, DDIMScheduler(), channels, **{k: f() for k, f in parts.items()})
    before = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    for lacking in (EMBEDS, {k: v for k, v in needs.items() if k != 'mask_image'} if name == 'inpaint' else {}):
        with pytest.raises(ValueError, match=f'{cls.__name__}.*(calibration_kwargs|record_inputs)'):
            quantize(pipe.unet, 8.5, calibration=pipe, calibration_kwargs=lacking, n_calibration=2, **QUICK)
    assert not packed_layers(pipe.unet) and all(torch.equal(v, before[k]) for k, v in pipe.unet.state_dict().items())
    quantize(pipe.unet, 8.5, calibration=pipe, calibration_kwargs=EMBEDS | needs, n_calibration=2, **QUICK)
    assert packed_layers(pipe.unet)


# what people give by mistake, and models of forms that have no rule

@pytest.mark.parametrize('prompts, message', [([], 'non-empty'), ('a cat', 'got str'), (['a cat', 7], 'entry 1 is a int'), (['', ' '], 'all 2 are empty')])
def test_prompts_that_are_none(prompts, message):
    pipe = pipeline(StableDiffusionPipeline, DDIMScheduler())
    with pytest.raises(ValueError, match=message): quantize(pipe.unet, 8.5, calibration=pipe, calibration_prompts=prompts, **TEXT, **QUICK)


def test_a_pipeline_without_vae_checker_and_text_encoder_teaches(monkeypatch):
    "What the pipeline is given for calibration, tuning gives it too."
    pipe, given = pipeline(StableDiffusionPipeline, DDIMScheduler()), {}
    pipe.register_modules(vae=None)
    monkeypatch.setattr(quant, 'timestep_weights', lambda *args: None)
    monkeypatch.setattr(quant, 'tune_model', lambda model, dense, source, tune, weights, **kw: given.update(kw))
    quantize(pipe.unet, 8.5, calibration=pipe, tune=1, **TEXT, **QUICK)
    assert packed_layers(pipe.unet) and given['kwargs'] is EMBEDS
    walk = Teacher(pipe, pipe.unet, 1, steps=2, kwargs=given['kwargs']).walk(0)
    assert walk.samples == 2 and all(c.guidance_scale is not None for c in walk)
    assert walk[0]['encoder_hidden_states'][2:].equal(EMBEDS['prompt_embeds'].half())


class OwnLoop(DiffusionPipeline):
    "A pipeline that leaves the timesteps to its caller."
    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, batch_size=1, num_inference_steps=3, generator=None):
        x = torch.randn(batch_size, 3, 8, 8, generator=generator)
        for t in self.scheduler.timesteps[:num_inference_steps]: x = self.scheduler.step(self.unet(x, t).sample, t, x).prev_sample
        return (x,)

@pytest.mark.parametrize('scheduler', [DDIMScheduler(), PNDMScheduler()], ids=lambda s: type(s).__name__)
def test_a_scheduler_that_was_never_given_timesteps(scheduler):
    pipe = OwnLoop(plain(), scheduler)
    with pytest.raises(ValueError, match='never given timesteps, see scheduler.set_timesteps'): quantize(pipe.unet, 8.5, calibration=pipe, n_calibration=2, **QUICK)


class Answers(torch.nn.Module):
    def __init__(self, how):
        super().__init__()
        self.a, self.b, self.how = torch.nn.Linear(16, 32), torch.nn.Linear(32, 16), how

    def forward(self, x):
        y = self.b(self.a(x).relu())
        return dict(tuple=(y, None), second=(None, y), dict=dict(out=y), nested=dict(a=dict(n=3, b=[y])), loss=(y.mean(), y), index=(y.argmax(-1), y), nothing=dict(n=3))[self.how]

ROWS = [((torch.randn(32, 16, generator=generator(i, 'rows')),), {}) for i in range(2)]

@pytest.mark.parametrize('how', ['tuple', 'second', 'dict', 'nested', 'loss', 'index'])
def test_what_matters_is_found_in_any_answer(how):
    "The first array of floats: neither a loss nor an index."
    model = Answers(how)
    assert answer(model, {'x': ROWS[0][0][0]}).shape == (32, 16)
    assert set(packed_layers(quantize(model, 6, calibration=ROWS, **{**QUICK, 'laq': True}))) == {'a', 'b'}

def test_an_answer_without_a_tensor_is_refused():
    with pytest.raises((TypeError, ValueError), match='no tensor of floats.*wrap it in a module'): quantize(Answers('nothing'), 6, calibration=ROWS, **{**QUICK, 'laq': True})


class Halves(torch.nn.Module):
    "A model of which calibration runs one half."
    def __init__(self):
        super().__init__()
        self.used, self.never = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)
        with torch.no_grad():
            for k, p in enumerate(self.parameters()): p.copy_(torch.randn(p.shape, generator=generator(k, 'half')))

    def forward(self, x, other=False): return (self.never if other else self.used)(x)

@pytest.mark.parametrize('laq', [False, True])
def test_layers_that_calibration_never_runs_are_named_and_kept_usable(laq):
    "LAQ saw no damage in them and gave them one bit."
    model = Halves()
    before = model.never.weight.detach().clone()
    with pytest.warns(UserWarning, match="1 layers are never run by the calibration inputs: 'never'"):
        quantize(model, 9, calibration=ROWS, **{**QUICK, 'laq': laq})
    off = (model.never.weight - before).norm()/before.norm()
    assert set(packed_layers(model)) == {'used', 'never'} and off < .02

def test_layers_of_another_call_are_not_missed():
    model = Halves()
    assert never_run(model, [*ROWS, (ROWS[0][0], dict(other=True))]) == [] and never_run(model, ROWS) == ['never']
