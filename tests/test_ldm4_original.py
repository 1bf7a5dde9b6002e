"""`load_ldm4` against the original network itself, where its source is at hand: set LDM_ORIGINAL to a checkout of github.com/CompVis/latent-diffusion
and TAMING to one of github.com/CompVis/taming-transformers, and install einops. Nothing of theirs is kept here; without them these tests are skipped."""
import aquatic_nb # noqa: F401  first: torchvision may lack its operators
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from aquatic_nb import zoo
from aquatic_nb.models import ldm
from aquatic_nb.core import generator

sys.path.insert(0, str(Path(__file__).parent))
from ldm_original import LatentDiffusion, bag, read_keys # noqa: E402

SMALL = ldm.LDMConfig(model_channels=32, context_dim=24, image_size=16, n_classes=12, ch=32, n_embed=64)
HEADS = replace(SMALL, num_heads=-1, num_head_channels=16, channel_mult=(1, 2), attention_resolutions=(1, 2), num_res_blocks=1, transformer_depth=2,
                vq_res_blocks=1, ch_mult=(1, 2), scale_factor=.5)


@pytest.fixture(scope='module')
def theirs():
    "Their classes; what they import besides (Lightning, omegaconf) is stood in for by empty shells."
    where = [os.environ.get(k) for k in ('LDM_ORIGINAL', 'TAMING')]
    if not all(where): pytest.skip('LDM_ORIGINAL and TAMING are not set')
    pytest.importorskip('einops')
    shells = {n: ModuleType(n) for n in ('pytorch_lightning', 'omegaconf', 'omegaconf.listconfig')}
    shells['pytorch_lightning'].LightningModule = nn.Module
    shells['omegaconf.listconfig'].ListConfig = type('ListConfig', (list,), {})
    with pytest.MonkeyPatch.context() as patch:
        for name, m in shells.items(): patch.setitem(sys.modules, name, m)
        for path in where: patch.syspath_prepend(path)
        from ldm.models.autoencoder import VQModelInterface
        from ldm.models.diffusion.ddim import DDIMSampler
        from ldm.modules.diffusionmodules.openaimodel import UNetModel
        from ldm.modules.ema import LitEma
        patch.setattr(DDIMSampler, 'register_buffer', lambda self, name, value: setattr(self, name, value)) # theirs wants CUDA
        yield SimpleNamespace(UNetModel=UNetModel, VQModelInterface=VQModelInterface, DDIMSampler=DDIMSampler, LitEma=LitEma)


def networks(theirs, c):
    "The three networks, named as in the checkpoint."
    heads = dict(num_heads=c.num_heads) if c.num_heads != -1 else dict(num_head_channels=c.num_head_channels)
    unet = theirs.UNetModel(image_size=c.image_size, in_channels=c.channels, out_channels=c.channels, model_channels=c.model_channels, num_res_blocks=c.num_res_blocks,
        attention_resolutions=list(c.attention_resolutions), channel_mult=list(c.channel_mult), use_spatial_transformer=True, transformer_depth=c.transformer_depth,
        context_dim=c.context_dim, **heads)
    dd = dict(double_z=False, z_channels=c.channels, resolution=c.image_size*2**(len(c.ch_mult) - 1), in_channels=c.image_channels, out_ch=c.image_channels, ch=c.ch,
              ch_mult=list(c.ch_mult), num_res_blocks=c.vq_res_blocks, attn_resolutions=[], dropout=0.)
    first = theirs.VQModelInterface(embed_dim=c.channels, n_embed=c.n_embed, ddconfig=dd, lossconfig=dict(target='torch.nn.Identity'))
    return bag(model=bag(diffusion_model=unet), first_stage_model=first, cond_stage_model=bag(embedding=nn.Embedding(c.n_classes, c.context_dim)))


@pytest.fixture(scope='module', params=[SMALL, HEADS], ids=['ldm4', 'heads'])
def pair(request, theirs, tmp_path_factory):
    c, g, path = request.param, generator(0, 'original'), tmp_path_factory.mktemp('ldm')/'model.ckpt'
    model = networks(theirs, c).eval()
    for name, p in model.named_parameters():
        if p.ndim > 1: p.data = torch.randn(p.shape, generator=g)*(1. if 'embedding' in name else p[0].numel()**-.5)
        else: p.data = torch.randn(p.shape, generator=g)*.2 + (1 if name.endswith('weight') else 0)
    schedule = {k: v for k, v in LatentDiffusion(c).state_dict().items() if k in ldm.SCHEDULE_KEYS}
    torch.save({'state_dict': model.state_dict() | schedule}, path)
    return c, model, schedule, zoo.load_ldm4(path, c, progress=False)


def noise(c): return torch.randn(2, c.channels, c.image_size, c.image_size, generator=generator(1, 'x'))


@torch.no_grad()
def test_networks(pair):
    c, model, _, pipe = pair
    labels, x = torch.tensor([3, c.n_classes - 1]), noise(c)
    context = model.cond_stage_model.embedding(labels[:, None])
    for t in (1, 501, 951):
        eps = model.model.diffusion_model(x, torch.tensor([t, t]), context=context)
        assert eps.std() > .1 and (pipe.unet(x, t, pipe.class_embedding(labels)).sample - eps).abs().max() < 1e-5
    image = model.first_stage_model.decode(x/c.scale_factor)
    assert image.std() > .1 and (pipe.decode(x) - image).abs().max() < 2e-5
    assert (pipe.encode(image) - model.first_stage_model.encode(image)*c.scale_factor).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize('guidance, steps', [(1., 20), (3., 20), (3., 30), (3., 15)])
def test_sampler(pair, theirs, guidance, steps):
    "Their DDIM sampler, guided, with their decoder; 30 and 15 do not divide 1,000, and it takes 31 and 16 steps."
    c, model, schedule, pipe = pair
    labels, x, embed = torch.tensor([1, 5]), noise(c), model.cond_stage_model.embedding
    diffusion = SimpleNamespace(num_timesteps=c.timesteps, device=torch.device('cpu'), **schedule, apply_model=lambda x, t, cond: model.model.diffusion_model(x, t, context=cond))
    latents, _ = theirs.DDIMSampler(diffusion).sample(S=steps, batch_size=2, shape=x.shape[1:], conditioning=embed(labels[:, None]), eta=0., x_T=x, progress=False,
        unconditional_guidance_scale=guidance, unconditional_conditioning=embed(torch.full((2, 1), c.n_classes - 1)))
    image = (model.first_stage_model.decode(latents/c.scale_factor)/2 + .5).clamp(0, 1)
    pipe.set_progress_bar_config(disable=True)
    assert (pipe(labels, steps, guidance, latents=x, output_type='pt', original_timesteps=True).images - image).abs().max() < 1e-4


def test_running_average(pair, theirs, tmp_path):
    "Their bookkeeping of averaged weights, under their names."
    c, model, schedule, _ = pair
    ema = theirs.LitEma(model.model)
    for name, b in ema.named_buffers():
        if name not in ('decay', 'num_updates'): b.mul_(2)
    state = model.state_dict() | schedule | {f'model_ema.{k}': v for k, v in ema.state_dict().items()}
    torch.save({'state_dict': state}, tmp_path/'ema.ckpt')
    weight = model.model.diffusion_model.input_blocks[0][0].weight
    assert zoo.load_ldm4(tmp_path/'ema.ckpt', c, progress=False).unet.conv_in.weight.equal(2*weight)
    assert zoo.load_ldm4(tmp_path/'ema.ckpt', c, use_ema=False, progress=False).unet.conv_in.weight.equal(weight)


def test_names_and_shapes_at_full_size(theirs):
    stored = read_keys(Path(__file__).parent/'data'/'ldm4_keys.csv')
    with torch.device('meta'): model = networks(theirs, ldm.LDMConfig())
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == {k: s for k, s in stored.items() if k not in ldm.SCHEDULE_KEYS}
