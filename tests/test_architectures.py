"Other architectures end to end, tiny and random: quantized, saved, loaded, sampled; and plans of the real ones, without weights."
import aquatic_nb # noqa: F401  first: torchvision may lack its operators
import inspect
import math

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMPipeline, DiffusionPipeline, DiTPipeline, DiTTransformer2DModel, UNet2DConditionModel

from aquatic_nb import ldm4
from aquatic_nb.aq import stored_bytes
from aquatic_nb.core import generator
from aquatic_nb.kaq import packable
from aquatic_nb.layers import packed_layers
from aquatic_nb.quant import plan, quant_report, quantize, quantize_unet
from aquatic_nb.zoo import ClassConditionalLDMPipeline, ClassEmbedding, ldm_scheduler
from packed_models import fill, plain

QUICK = dict(laq=False, sweeps=1, beam=2, n_calibration=2, progress=False)


def kl(channels=3):
    return fill(AutoencoderKL(in_channels=channels, out_channels=channels, block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2, sample_size=16,
                              down_block_types=('DownEncoderBlock2D',)*2, up_block_types=('UpDecoderBlock2D',)*2, latent_channels=4))


def text_unet(**more):
    return fill(UNet2DConditionModel(sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=('CrossAttnDownBlock2D', 'DownBlock2D'), up_block_types=('UpBlock2D', 'CrossAttnUpBlock2D'), cross_attention_dim=12, attention_head_dim=2, **more))


class PromptPipeline(DiffusionPipeline):
    "Stable Diffusion from the prompt's embedding on: U-Net, first stage, guidance over several tokens; the text encoder stays outside."

    def __init__(self, unet, vae, scheduler):
        super().__init__()
        self.register_modules(unet=unet, vae=vae, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, prompt_embeds=None, batch_size=2, num_inference_steps=3, guidance_scale=3., generator=None, output_type='np'):
        c = self.unet.config
        if prompt_embeds is None: prompt_embeds = torch.randn(batch_size, 5, c.cross_attention_dim, generator=generator)
        n, text = len(prompt_embeds), torch.cat([torch.zeros_like(prompt_embeds), prompt_embeds])
        x = torch.randn(n, c.in_channels, c.sample_size, c.sample_size, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            null, cond = self.unet(torch.cat([x, x]), t, encoder_hidden_states=text).sample.chunk(2)
            x = self.scheduler.step(null + guidance_scale*(cond - null), t, x).prev_sample
        return self.vae.decode(x).sample.clamp(-1, 1).numpy()


def schedule(): return DDIMScheduler(num_train_timesteps=100, clip_sample=False)


def ddpm():
    pipe = DDPMPipeline(plain(), schedule())
    return pipe, 'unet', lambda p: p(batch_size=2, generator=generator(0, 'sample'), num_inference_steps=2, output_type='np').images


def ldm():
    unet = fill(UNet2DConditionModel(sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D'), up_block_types=('CrossAttnUpBlock2D', 'UpBlock2D'), cross_attention_dim=16, attention_head_dim=1))
    pipe = ClassConditionalLDMPipeline(unet, kl(1), ClassEmbedding(5, 16), ldm_scheduler())
    return pipe, 'unet', lambda p: p(class_labels=[1, 3], generator=generator(0, 'sample'), num_inference_steps=2, guidance_scale=2., output_type='np').images


def text():
    pipe = PromptPipeline(text_unet(), kl(), schedule())
    prompt = torch.randn(2, 7, 12, generator=generator(0, 'prompt'))
    return pipe, 'unet', lambda p: p(prompt, num_inference_steps=2, generator=generator(0, 'sample'))


def dit():
    model = fill(DiTTransformer2DModel(sample_size=8, in_channels=4, out_channels=8, num_layers=2, num_attention_heads=2, attention_head_dim=8, patch_size=2, num_embeds_ada_norm=1000, # the pipeline takes 1000 for 'no class'
                                       norm_num_groups=4, norm_type='ada_norm_zero', norm_elementwise_affine=False, activation_fn='gelu-approximate', attention_bias=True))
    pipe = DiTPipeline(model, kl(), schedule())
    return pipe, 'transformer', lambda p: p([0, 5], generator=generator(0, 'sample'), num_inference_steps=2, output_type='np').images


@pytest.fixture(params=[ddpm, ldm, text, dit], ids=lambda f: f.__name__)
def case(request):
    pipe, part, draw = request.param()
    pipe.set_progress_bar_config(disable=True)
    return pipe, part, draw


def test_quantized_saved_loaded_sampled(case, tmp_path):
    pipe, part, draw = case
    model, before = getattr(pipe, part), draw(pipe)
    weights, names = sum(m.weight.numel() for m in packable(model).values()), set(packable(model))
    quantize_unet(model, 7, calibration=pipe, **QUICK)
    report = quant_report(model)
    assert set(packed_layers(model)) == names and report.attrs['weights'] == weights and report.attrs['bits'] <= 7
    image = draw(pipe)
    assert image.shape == before.shape and not (image == before).all()
    pipe.save_pretrained(tmp_path)
    again = type(pipe).from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert type(getattr(again, part)) is type(model) and set(packed_layers(getattr(again, part))) == names
    assert (draw(again) == image).all()


def test_every_text_token_reaches_the_moments():
    "With one token the softmax of cross-attention is constant; with several, to_q and to_k matter and are calibrated."
    prompts = torch.randn(3, 7, 12, generator=generator(1, 'prompt'))
    given = [dict(sample=torch.randn(3, 4, 8, 8, generator=generator(t, 'x')), timestep=torch.full((3,), t), encoder_hidden_states=prompts) for t in (5, 50)]
    one, two = text_unet(), text_unet()
    quantize_unet(one, 7, calibration=given, **QUICK)
    quantize_unet(two, 7, calibration=[{**g, 'encoder_hidden_states': -3*g['encoder_hidden_states'].flip(-1)} for g in given], **QUICK)
    name = next(n for n in packed_layers(one) if n.endswith('attn2.to_k'))
    assert not torch.equal(one.get_submodule(name).weight, two.get_submodule(name).weight)
    with torch.no_grad():
        out = [one(given[0]['sample'], 5, p).sample for p in (prompts, prompts.flip(1), prompts + torch.randn(3, 7, 12, generator=generator(2, 'p')))]
    torch.testing.assert_close(out[0], out[1], rtol=1e-3, atol=1e-4) # the order of the tokens does not matter, their values do
    assert (out[0] - out[2]).abs().max() > 1e-3


def test_sdxl_conditioning_in_small():
    "Text, pooled text and sizes: `calibration='auto'` makes them up from the config."
    unet = text_unet(addition_embed_type='text_time', addition_time_embed_dim=8, projection_class_embeddings_input_dim=6*8 + 10, use_linear_projection=True)
    quantize_unet(unet, 8, calibration='auto', **QUICK)
    assert 'add_embedding.linear_1' in packed_layers(unet)
    inputs = ldm4.example_inputs(unet, 4, 'cpu')
    with torch.no_grad(): assert torch.isfinite(unet(**inputs).sample).all()


def test_dit_keeps_its_embedders_and_packs_adaln():
    pipe, _, _ = dit()
    model = pipe.transformer
    table = plan(model, 7).set_index('layer')
    classes = [n for n in table.index if n.endswith('class_embedder.embedding_table')]
    assert len(classes) == 2 and (table.scheme[classes] == 'dense').all() # one copy in each block
    ada = [n for n in table.index if n.endswith('norm1.linear')]
    assert len(ada) == 2 and (table.scheme[ada] != 'dense').all()
    quantize(model, 7, calibration=pipe, **QUICK)
    a, b = (model.get_submodule(n).weight for n in classes)
    assert a.dtype == torch.float32 and a.shape == b.shape and set(ada) <= set(packed_layers(model))


@pytest.mark.parametrize('name', sorted(ldm4.CONFIGS))
def test_plans_of_the_real_ones(name):
    "Full-size configurations on the meta device: what is stored adds up, without a single weight."
    model = ldm4.meta_model(name)
    assert all(p.is_meta for p in model.parameters())
    layers = packable(model)
    weights = sum(m.weight.numel() for m in layers.values())
    for bits in (2, 4):
        table = plan(model, bits).set_index('layer')
        packed = table[table.scheme != 'dense']
        assert set(packed.index) == set(layers)
        assert bits - .35 < 8*packed.bytes.sum()/weights <= bits
        assert (packed.bits == 8*packed.bytes/packed['shape'].map(math.prod)).all()
        if name == 'LDM-4' and bits == 2: assert packed.bytes.sum() + 4*(ldm4.CONFIGS[name]['parameters'] - weights) < 102e6 # everything else in float32
    kinds = ldm4.model_plan(name)
    schemes = ldm4.PLAN_SCHEMES['W2']
    assert kinds['W2 MB']['total'] == pytest.approx((sum(stored_bytes(schemes[not (m.weight.dim() == 4 and m.kernel_size == (3, 3))], m.weight.shape) for m in layers.values())
                                                     + 2*(ldm4.CONFIGS[name]['parameters'] - weights))/1e6)


def test_a_meta_model_is_refused_with_its_reason():
    with pytest.raises(ValueError, match='meta device'): quantize_unet(ldm4.meta_model('LDM-4'), 2)


def test_example_inputs_fit_every_config():
    for name in ldm4.CONFIGS:
        model = ldm4.meta_model(name)
        inputs = ldm4.example_inputs(model, ldm4.CONFIGS[name]['tokens'] or 1)
        assert set(inputs) <= set(inspect.signature(model.forward).parameters)
        with torch.no_grad(): assert model(**inputs).sample.shape[-1] == model.config.sample_size
