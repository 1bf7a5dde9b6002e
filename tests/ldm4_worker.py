"""One process of a tiny evaluation, started by test_ldm4_eval.py: ldm4_worker.py OUT.  DIE='rank:n' makes that rank kill itself before its n-th write;
MODEL=shipped takes the shipped model."""
import copy
import os
import signal
import sys

import torch

import aquatic_nb.ldm4 as ldm4
from aquatic_nb.eval import samples
from aquatic_nb.metrics import Extractor, feature_stats
from aquatic_nb.zoo import ClassConditionalLDMPipeline, ClassEmbedding, ldm_scheduler, load_mini_ldm

PROTOCOL = ldm4.Protocol(samples=20, steps=4, guidance_scale=2., eta=.5, shard_size=3, batch_size=2)


def tiny_pipe():
    from diffusers import AutoencoderKL, UNet2DConditionModel
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(sample_size=4, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
                                    down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D'), up_block_types=('CrossAttnUpBlock2D', 'UpBlock2D'),
                                    cross_attention_dim=16, attention_head_dim=1)
        vae = AutoencoderKL(in_channels=1, out_channels=1, block_out_channels=(4, 4, 8), layers_per_block=1, norm_num_groups=2, sample_size=16,
                            down_block_types=('DownEncoderBlock2D',)*3, up_block_types=('UpDecoderBlock2D',)*3, latent_channels=4)
        return ClassConditionalLDMPipeline(unet.eval(), vae.eval(), ClassEmbedding(5, 16), ldm_scheduler())


def tiny_judge():
    def forward(x):
        x = x.float()/255
        small = torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)
        return dict(features=torch.cat([small, x.std((1, 2, 3))[:, None]], 1), spatial=small, logits=torch.cat([small, small[:, :1]], 1)*9)
    extractor = Extractor('tiny', forward, channels=1)
    real = torch.randint(256, (60, 1, 16, 16), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    return ldm4.Judge(extractor, feature_stats(real, extractor), classifier=True)


def coarse(pipe):
    unet = copy.deepcopy(pipe.unet)
    for p in unet.parameters(): p.data = (p.data*16).round()/16
    return unet


def main(out):
    rank, at = map(int, os.environ.get('DIE', '-1:0').split(':'))
    if rank == int(os.environ.get('RANK', 0)):
        write, left = samples.write_npz, [at]
        def deadly(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0: os.kill(os.getpid(), signal.SIGKILL)
            return write(*args, **kwargs)
        ldm4.write_npz = samples.write_npz = deadly
    torch.set_num_threads(1)
    shipped = os.environ.get('MODEL') == 'shipped'
    pipe, judge = (load_mini_ldm(), ldm4.mini_judge(200)) if shipped else (tiny_pipe(), tiny_judge())
    return ldm4.evaluate_models(pipe, {'full precision': None, 'coarse': coarse}, out, PROTOCOL, judge, progress=False)


if __name__ == '__main__': main(sys.argv[1])
