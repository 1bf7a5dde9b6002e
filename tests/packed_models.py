"""Tiny packed models for the tests of the hub: what they compute does not matter, only that it stays the same."""
import aquatic_nb # noqa: F401  first: torchvision may lack its operators
import torch
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DConditionModel, UNet2DModel

from aquatic_nb.aq import AQTensor, Scheme, residual_kmeans
from aquatic_nb.core import generator
from aquatic_nb.hub import attach
from aquatic_nb.kaq import natural_group_size, packable, to_groups
from aquatic_nb.layers import from_aq, swap

def fill(model, seed=0):
    g = generator(seed, 'weights')
    with torch.no_grad():
        for p in model.parameters(): p.copy_(torch.randn(p.shape, generator=g)/max(1, p[0].numel())**.5 if p.dim() > 1 else p.round() + .1*torch.randn(p.shape, generator=g))
    return model.eval()

def conditional(seed=0):
    "A U-Net with attention and all the kinds of layers that the real ones have."
    return fill(UNet2DConditionModel(sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D'), up_block_types=('CrossAttnUpBlock2D', 'UpBlock2D'), cross_attention_dim=8, attention_head_dim=4), seed)

def plain(seed=0):
    "A U-Net for DDPMPipeline."
    return fill(UNet2DModel(sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=('DownBlock2D', 'AttnDownBlock2D'), up_block_types=('AttnUpBlock2D', 'UpBlock2D'), attention_head_dim=4), seed)

def pack_layer(module, bits=6, M=2, dtype='fp16', seed=0):
    d, w = natural_group_size(module.weight.shape), module.weight.detach().float()
    scale = w.flatten(1).pow(2).mean(1).sqrt().clamp(min=1e-6)
    if dtype == 'uniform':
        scale = w.flatten(1).abs().amax(1)/(2**(bits - 1) - 1)
        codes = (w.flatten(1)/scale[:, None]).round().clamp(-2**(bits - 1), 2**(bits - 1) - 1) + 2**(bits - 1)
        scheme = Scheme(1, bits, 1, 'int8', 'uniform')
        books = torch.arange(-2**(bits - 1), 2**(bits - 1)).to(torch.int8).reshape(1, -1, 1)
        return from_aq(module, AQTensor(codes[..., None].short(), books, scale.half(), w.shape, scheme))
    groups = to_groups(w/scale.view(-1, *[1]*(w.dim() - 1)), d)
    scheme = Scheme(M, bits, d, dtype)
    books, codes = residual_kmeans(groups.flatten(0, 1), scheme, iters=1, generator=generator(seed, 'kmeans'))
    if dtype == 'int8':
        unit = books.abs().amax((1, 2)).sum()/126
        books, scale = (books/unit).round().clamp(-127, 127).to(torch.int8), scale*unit
    return from_aq(module, AQTensor(codes.reshape(*groups.shape[:2], M).short(), books if dtype == 'int8' else books.half(), scale.half(), w.shape, scheme))

def class_pipe(seed=0):
    "A class-conditional pipeline, the smallest that can be tuned."
    from diffusers import AutoencoderKL
    from aquatic_nb.zoo import ClassConditionalLDMPipeline, ClassEmbedding, ldm_scheduler
    unet = fill(UNet2DConditionModel(sample_size=4, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4, mid_block_type='UNetMidBlock2DCrossAttn',
        down_block_types=('DownBlock2D',), up_block_types=('UpBlock2D',), cross_attention_dim=8, attention_head_dim=4), seed)
    vae = fill(AutoencoderKL(latent_channels=4, block_out_channels=(4,), norm_num_groups=2, sample_size=4), seed)
    return ClassConditionalLDMPipeline(unet, vae, fill(ClassEmbedding(5, 8), seed), ldm_scheduler())

KINDS = [(4, 'fp16'), (8, 'int8'), (9, 'fp16'), (5, 'uniform'), (3, 'int8'), (8, 'uniform')] # every layout of the planes, both codebook dtypes, none

def pack_model(model, shared=True, **kw):
    "Pack all layers but the first and the last, with layouts in turn; q and k of the mid block share their codebooks."
    for i, (name, module) in enumerate(packable(model).items()):
        bits, dtype = KINDS[i % len(KINDS)]
        if name not in ('conv_in', 'conv_out'): swap(model, name, pack_layer(module, bits, dtype=dtype, **kw))
    pair = [n for n, m in model.named_modules() if n.startswith('mid_block') and n.endswith(('attn1.to_q', 'attn1.to_k', 'attentions.0.to_q', 'attentions.0.to_k'))]
    if shared and len(pair) == 2:
        like = type(model)(**{k: v for k, v in model.config.items() if not k.startswith('_')})
        fill(like)
        for n in pair: swap(model, n, pack_layer(like.get_submodule(n)))
        model.get_submodule(pair[1]).codebooks = model.get_submodule(pair[0]).codebooks
    return attach(model, bits=6)

X, C = torch.randn(2, 3, 8, 8, generator=generator(0, 'x')), torch.randn(2, 1, 8, generator=generator(0, 'c'))

def run(model, t=7):
    "What a model makes of one fixed input."
    x = X.to(model.dtype)
    with torch.no_grad(): return (model(x, t, C.to(model.dtype)) if getattr(model.config, 'cross_attention_dim', None) else model(x, t)).sample

def ddpm(unet): return DDPMPipeline(unet, DDIMScheduler(num_train_timesteps=100))
def sample(pipe, seed=0, steps=3): return pipe(batch_size=2, generator=generator(seed, 'sample'), num_inference_steps=steps, output_type='np').images
