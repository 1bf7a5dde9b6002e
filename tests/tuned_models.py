"A tiny conditional U-Net, packed, and its teacher: what the tests of tuning train."
import copy

import aquatic_nb # noqa: F401  first: diffusers imports torchvision
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

from aquatic_nb.aq import Scheme
from aquatic_nb.core import Run
from aquatic_nb.encode import encode
from aquatic_nb.kaq import natural_group_size, packable
from aquatic_nb.layers import from_aq, swap
from aquatic_nb.tune.distill import Teacher, TuneConfig, distill
from aquatic_nb.walk import record_walk, steps_of

CLASSES = torch.randn(5, 1, 16, generator=torch.Generator().manual_seed(3))
QUIET = Run(progress=False)
SETUP = dict(steps=12, batch=4, code_every=2, code_fraction=.1, code_lr=1., trust_ratio=.9, warmup=2, bf16=False)


def scheduler(): return DDIMScheduler(beta_schedule='scaled_linear', beta_start=.0015, beta_end=.0195, clip_sample=False)


def conditional():
    torch.manual_seed(0)
    return UNet2DConditionModel(sample_size=4, in_channels=2, out_channels=2, down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D'),
                                up_block_types=('CrossAttnUpBlock2D', 'UpBlock2D'), block_out_channels=(8, 16), layers_per_block=1,
                                norm_num_groups=4, cross_attention_dim=16, attention_head_dim=1).eval().requires_grad_(False)


def packed_copy(unet):
    model = copy.deepcopy(unet)
    for n, m in packable(model).items():
        swap(model, n, from_aq(m, encode(m.weight.detach(), None, Scheme(2, 3, natural_group_size(m.weight.shape)), sweeps=1)))
    return model


def walks(unet, batch=8, steps=5, scale=1.5):
    "Walks of a bare U-Net, as a function that a Teacher takes."
    def make(i, gen):
        labels = torch.randint(4, (batch,), generator=gen)
        token = lambda c: dict(encoder_hidden_states=c)
        noise = torch.randn(batch, 2, 4, 4, generator=gen)
        return record_walk(unet, steps_of(scheduler(), batch, steps, gen), noise, token(CLASSES[labels]),
                           token(CLASSES[4:].expand(batch, -1, -1)), scale, run=QUIET)
    return make


def teacher_of(unet, n_walks=3, seed=0, **kw): return Teacher(walks(unet), unet, n_walks, steps=5, seed=seed, **kw)


def tuned(packed, teacher, **kw):
    "A tuned copy, and the log."
    model = copy.deepcopy(packed)
    extra = {k: kw.pop(k) for k in ('checkpoint', 'every_minutes', 'held', 'watch', 'clock', 'weights') if k in kw}
    config = SETUP | kw
    if 'minutes' in kw: config.pop('steps')
    return model, distill(model, teacher, TuneConfig(**config), run=QUIET, **extra)


def same(a, b): return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))
