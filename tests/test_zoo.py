"The pipeline as a citizen of diffusers, and the shipped model's files."
import json
import shutil
import subprocess
import sys

import pytest
import torch

from aquatic_nb import zoo
from aquatic_nb.core import generator # before diffusers, which wants torchvision's operators
from diffusers import AutoencoderKL, DDPMScheduler, EulerDiscreteScheduler, UNet2DConditionModel, VQModel # noqa: E402


def tiny(kind='kl', seed=0, **stats):
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
        down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D'), up_block_types=('CrossAttnUpBlock2D', 'UpBlock2D'), cross_attention_dim=16)
    kw = dict(in_channels=3, out_channels=3, block_out_channels=(8, 8, 16), layers_per_block=1, norm_num_groups=4, scaling_factor=.5,
              down_block_types=('DownEncoderBlock2D',)*3, up_block_types=('UpDecoderBlock2D',)*3, latent_channels=4)
    vae = AutoencoderKL(**kw) if kind == 'kl' else VQModel(num_vq_embeddings=32, vq_embed_dim=4, **kw)
    pipe = zoo.ClassConditionalLDMPipeline(unet.eval(), vae.eval(), zoo.ClassEmbedding(5, 16), zoo.ldm_scheduler(), **stats)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, labels=(0, 4), seed=3, **kw):
    return pipe(list(labels), **{**dict(num_inference_steps=3, generator=generator(seed, 'draw'), output_type='pt'), **kw}).images


@pytest.mark.parametrize('kind', ['kl', 'vq'])
@pytest.mark.parametrize('stats', [{}, dict(latents_mean=[.1, .2, .3, .4], latents_std=[1., 2., 3., 4.]), dict(latents_mean=[.1]*4, latents_std=[2.]*4)])
def test_round_trip(kind, stats, tmp_path):
    pipe = tiny(kind, **stats)
    pipe.save_pretrained(tmp_path)
    again = zoo.ClassConditionalLDMPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert draw(pipe).equal(draw(again)) and draw(pipe).shape == (2, 3, 32, 32)
    assert again.config.latents_mean == stats.get('latents_mean')
    assert not list(tmp_path.rglob('*.bin'))
    half = zoo.ClassConditionalLDMPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert {half.unet.dtype, half.vae.dtype, half.class_embedding.dtype} == {torch.bfloat16} and draw(half).isfinite().all()


def test_a_reader_who_did_not_import_us_is_told(tmp_path):
    tiny().save_pretrained(tmp_path)
    assert json.loads((tmp_path/'model_index.json').read_text())['class_embedding'] == ['aquatic_nb.zoo', 'ClassEmbedding']
    code = f"""if True:
        from aquatic_nb import core
        from diffusers import DiffusionPipeline, UNet2DConditionModel
        UNet2DConditionModel.from_pretrained({str(tmp_path)!r}, subfolder='unet') # diffusers' own parts load without us
        from aquatic_nb.zoo import ClassConditionalLDMPipeline as P
        print(P.from_pretrained({str(tmp_path)!r})([1], 1, output_type='np').images.shape)"""
    out = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert out.returncode == 0 and '(1, 32, 32, 3)' in out.stdout, out.stderr[-2000:]


def test_components_can_be_swapped_and_reused():
    pipe = tiny()
    other = zoo.ClassConditionalLDMPipeline(**pipe.components)
    assert set(pipe.components) == {'unet', 'vae', 'class_embedding', 'scheduler'}
    other.set_progress_bar_config(disable=True)
    assert draw(pipe).equal(draw(other))
    other.unet = tiny(seed=1).unet
    assert not draw(pipe).equal(draw(other))


@pytest.mark.parametrize('scheduler', [DDPMScheduler, EulerDiscreteScheduler])
def test_other_schedulers(scheduler):
    pipe = tiny()
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    assert draw(pipe).isfinite().all() and draw(pipe).equal(draw(pipe))


def test_samples_do_not_depend_on_their_neighbours():
    pipe = tiny()
    each = lambda labels: draw(pipe, labels, generator=[generator(i, 'each') for i in labels])
    together = each([0, 1, 2])
    assert torch.allclose(each([1])[0], together[1], atol=1e-5)


def test_guidance_zero_ignores_the_class_and_one_needs_no_null():
    pipe = tiny()
    noise = torch.randn(1, 4, 8, 8, generator=generator(0)).expand(2, -1, -1, -1)
    a, b = draw(pipe, (0, 4), latents=noise, guidance_scale=0.)
    assert torch.allclose(a, b, atol=1e-5)
    calls = []
    pipe.unet.register_forward_pre_hook(lambda m, args, kw: calls.append(len(kw['sample'])), with_kwargs=True)
    draw(pipe, guidance_scale=1.)
    draw(pipe, guidance_scale=2.)
    assert calls == [2]*3 + [4]*3 # one batched call a step


def test_callback_may_change_latents_and_start_noise_is_left_alone():
    pipe = tiny()
    noise = torch.randn(2, 4, 8, 8, generator=generator(0))
    kept = noise.clone()
    zeroed = draw(pipe, latents=noise, output_type='latent', callback_on_step_end=lambda p, i, t, kw: {'latents': torch.zeros_like(kw['latents'])})
    assert zeroed.abs().max() == 0 and noise.equal(kept)


@pytest.mark.parametrize('kw, error, message', [
    (dict(labels=(5,)), ValueError, r'class_labels: 5 .* 0\.\.4'), (dict(labels=(-1,)), ValueError, 'class_labels: -1'),
    (dict(labels=()), ValueError, 'class_labels: empty'), (dict(labels=(1.5,)), TypeError, 'class_labels: expected integers'),
    (dict(num_inference_steps=-1), ValueError, 'num_inference_steps: -1'), (dict(num_inference_steps=0), ValueError, 'num_inference_steps: 0'),
    (dict(num_inference_steps=2.), TypeError, 'num_inference_steps'), (dict(num_inference_steps=1000), ValueError, '1..999'),
    (dict(guidance_scale=float('inf')), ValueError, 'guidance_scale'), (dict(eta=-1), ValueError, 'eta'),
    (dict(output_type='jpeg'), ValueError, 'output_type'), (dict(latents=torch.zeros(2, 3, 8, 8)), ValueError, r'latents: shape \(2, 3, 8, 8\)'),
    (dict(generator=[generator(0)]), ValueError, 'generator: 1 generators for 2 labels')])
def test_bad_input_is_named(kw, error, message):
    with pytest.raises(error, match=message): draw(tiny(), **kw)


# the shipped model -----------------------------------------------------------------------------------------------------

def test_shipped_files():
    root = zoo.mini_path()
    files = [p for p in root.rglob('*') if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 36e6
    assert not [p for p in files if p.suffix in ('.pt', '.pkl', '.bin', '.ckpt')]
    card = (root/'model_card.md').read_text()
    for word in ('Fashion-MNIST', 'MIT', 'Recipe', 'Measured', 'guidance'): assert word in card
    with pytest.raises(FileNotFoundError, match='nothing.here is missing; reinstall'): zoo.mini_path('nothing.here')


def test_shipped_model_is_what_the_card_says():
    pipe, classifier = zoo.load_mini_ldm(), zoo.load_mini_classifier()
    pipe.set_progress_bar_config(disable=True)
    assert pipe.unet.dtype == torch.float32 and list(pipe.unet.config.block_out_channels) == [96, 192]
    images, labels = zoo.mini_reference()
    assert images.shape == (10000, 1, 32, 32) and images.dtype == torch.uint8 and labels.bincount().tolist() == [1000]*10
    x = images[:200].float()/127.5 - 1
    with torch.no_grad():
        assert (classifier(x).argmax(1) == labels[:200]).float().mean() > .9
        back = pipe.decode(pipe.encode(x)).clamp(-1, 1)
        assert -10*((back - x)/2).square().mean().log10() > 25.5
        asked = torch.arange(20) % 10
        samples = pipe(asked, 10, generator=generator(0, 'test'), output_type='pt').images
        assert (classifier(samples*2 - 1).argmax(1) == asked).float().mean() > .8


def test_latents_are_normalised():
    pipe, (images, _) = zoo.load_mini_ldm(), zoo.mini_reference()
    with torch.no_grad(): z = pipe.encode(images[:500].float()/127.5 - 1)
    assert z.mean((0, 2, 3)).abs().max() < .15 and (z.std((0, 2, 3)) - 1).abs().max() < .15


def test_missing_weights_are_named(tmp_path, monkeypatch):
    package = tmp_path/'aquatic_nb'
    shutil.copytree(zoo.mini_path(), package/'assets'/'mini_ldm', ignore=shutil.ignore_patterns('*.safetensors', '*.npz'))
    monkeypatch.setattr(zoo, 'files', lambda name: package)
    for load in (zoo.load_mini_ldm, zoo.load_mini_classifier, zoo.mini_reference):
        with pytest.raises(FileNotFoundError, match='reinstall aquatic-nb'): load()


def test_no_network_is_needed(tmp_path):
    code = """if True:
        import socket
        def refuse(*a, **k): raise OSError('no network')
        socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
        from aquatic_nb import zoo
        print(zoo.load_mini_ldm()([3], 1, output_type='np').images.shape, len(zoo.mini_reference()[0]))"""
    out = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, cwd=tmp_path)
    assert '(1, 32, 32, 1) 10000' in out.stdout, out.stderr[-2000:]
