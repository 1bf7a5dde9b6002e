"""The network of LDM-4 once more, small and independent, under the original checkpoint's attribute names.

Nothing here uses diffusers: it is what `load_ldm4` is held against. Plain functions of torch, written from the description
of the architecture (residual blocks with a time projection, a transformer on each attention level, a VQ first stage).
"""
import csv
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn


def bag(**modules):
    "A module that only holds others, under the names given."
    m = nn.Module()
    for name, o in modules.items(): m.add_module(name, o)
    return m


# U-Net -----------------------------------------------------------------------------------------------------------------

class Res(nn.Module):
    def __init__(self, n_in, n_out, n_time):
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(32, n_in), nn.SiLU(), nn.Conv2d(n_in, n_out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(n_time, n_out))
        self.out_layers = nn.Sequential(nn.GroupNorm(32, n_out), nn.SiLU(), nn.Identity(), nn.Conv2d(n_out, n_out, 3, padding=1))
        self.skip_connection = nn.Identity() if n_in == n_out else nn.Conv2d(n_in, n_out, 1)

    def forward(self, x, time, context):
        h = self.in_layers(x) + self.emb_layers(time)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class Attention(nn.Module):
    def __init__(self, width, context, heads):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(n, width, bias=False) for n in (width, context, context))
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def forward(self, x, context):
        q, k, v = (f(o).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f, o in
                   ((self.to_q, x), (self.to_k, context), (self.to_v, context)))
        weights = (q @ k.transpose(-1, -2)/math.sqrt(q.shape[-1])).softmax(-1)
        return self.to_out((weights @ v).transpose(1, 2).flatten(2))


class Gated(nn.Module):
    def __init__(self, n_in, n_out):
        super().__init__()
        self.proj = nn.Linear(n_in, 2*n_out)

    def forward(self, x):
        value, gate = self.proj(x).chunk(2, -1)
        return value*F.gelu(gate)


class TransformerBlock(nn.Module):
    def __init__(self, width, context, heads):
        super().__init__()
        self.attn1, self.attn2 = Attention(width, width, heads), Attention(width, context, heads)
        self.ff = bag(net=nn.Sequential(Gated(width, 4*width), nn.Identity(), nn.Linear(4*width, width)))
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, x, context):
        y = self.norm1(x)
        x = x + self.attn1(y, y)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff.net(self.norm3(x))


class Transformer(nn.Module):
    def __init__(self, width, context, heads, depth):
        super().__init__()
        self.norm = nn.GroupNorm(32, width, eps=1e-6)
        self.proj_in, self.proj_out = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList(TransformerBlock(width, context, heads) for _ in range(depth))

    def forward(self, x, time, context):
        h = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)
        for block in self.transformer_blocks: h = block(h, context)
        return x + self.proj_out(h.transpose(1, 2).reshape(x.shape))


class Down(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.op = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x, time, context): return self.op(x)


class Up(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x, time, context): return self.conv(F.interpolate(x, scale_factor=2, mode='nearest'))


class First(nn.Conv2d):
    def forward(self, x, time, context): return super().forward(x)


class UNet(nn.Module):
    def __init__(self, c):
        super().__init__()
        w, n_time = c.model_channels, 4*c.model_channels
        heads = lambda width: c.num_heads if c.num_heads != -1 else width//c.num_head_channels
        transformer = lambda width: Transformer(width, c.context_dim, heads(width), c.transformer_depth)
        attends = lambda level: 2**level in c.attention_resolutions
        self.width = w
        self.time_embed = nn.Sequential(nn.Linear(w, n_time), nn.SiLU(), nn.Linear(n_time, n_time))
        self.input_blocks = nn.ModuleList([nn.ModuleList([First(c.channels, w, 3, padding=1)])])
        now, skips = w, [w]
        for level, mult in enumerate(c.channel_mult):
            for _ in range(c.num_res_blocks):
                self.input_blocks.append(nn.ModuleList([Res(now, w*mult, n_time)] + [transformer(w*mult)]*attends(level)))
                now = w*mult
                skips.append(now)
            if level < len(c.channel_mult) - 1:
                self.input_blocks.append(nn.ModuleList([Down(now)]))
                skips.append(now)
        self.middle_block = nn.ModuleList([Res(now, now, n_time), transformer(now), Res(now, now, n_time)])
        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(c.channel_mult))):
            for i in range(c.num_res_blocks + 1):
                block = [Res(now + skips.pop(), w*mult, n_time)] + [transformer(w*mult)]*attends(level)
                now = w*mult
                if level > 0 and i == c.num_res_blocks: block.append(Up(now))
                self.output_blocks.append(nn.ModuleList(block))
        self.out = nn.Sequential(nn.GroupNorm(32, now), nn.SiLU(), nn.Conv2d(now, c.channels, 3, padding=1))

    def forward(self, x, t, context):
        half = self.width//2
        angles = t.float()[:, None]*torch.exp(-math.log(10000)*torch.arange(half)/half)[None]
        time = self.time_embed(torch.cat([angles.cos(), angles.sin()], 1))
        kept = []
        for block in self.input_blocks:
            for m in block: x = m(x, time, context)
            kept.append(x)
        for m in self.middle_block: x = m(x, time, context)
        for block in self.output_blocks:
            x = torch.cat([x, kept.pop()], 1)
            for m in block: x = m(x, time, context)
        return self.out(x)


# first stage -----------------------------------------------------------------------------------------------------------

class VQRes(nn.Module):
    def __init__(self, n_in, n_out):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(32, n_in, eps=1e-6), nn.Conv2d(n_in, n_out, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(32, n_out, eps=1e-6), nn.Conv2d(n_out, n_out, 3, padding=1)
        if n_in != n_out: self.nin_shortcut = nn.Conv2d(n_in, n_out, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return (self.nin_shortcut(x) if hasattr(self, 'nin_shortcut') else x) + h


class VQAttention(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.norm = nn.GroupNorm(32, n, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(n, n, 1) for _ in range(4))

    def forward(self, x):
        y = self.norm(x)
        q, k, v = (f(y).flatten(2) for f in (self.q, self.k, self.v))
        weights = (q.transpose(1, 2) @ k/math.sqrt(x.shape[1])).softmax(-1) # [B, query, key]
        return x + self.proj_out((v @ weights.transpose(1, 2)).reshape(x.shape))


class VQDown(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.conv = nn.Conv2d(n, n, 3, stride=2)

    def forward(self, x): return self.conv(F.pad(x, (0, 1, 0, 1))) # zeros right and below only


class VQUp(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.conv = nn.Conv2d(n, n, 3, padding=1)

    def forward(self, x): return self.conv(F.interpolate(x, scale_factor=2., mode='nearest'))


def vq_mid(n): return bag(block_1=VQRes(n, n), attn_1=VQAttention(n), block_2=VQRes(n, n))


class VQEncoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        now = c.ch
        self.conv_in, self.down = nn.Conv2d(c.image_channels, c.ch, 3, padding=1), nn.ModuleList()
        for level, mult in enumerate(c.ch_mult):
            blocks = nn.ModuleList()
            for _ in range(c.vq_res_blocks):
                blocks.append(VQRes(now, c.ch*mult))
                now = c.ch*mult
            last = level == len(c.ch_mult) - 1
            self.down.append(bag(block=blocks) if last else bag(block=blocks, downsample=VQDown(now)))
        self.mid, self.norm_out, self.conv_out = vq_mid(now), nn.GroupNorm(32, now, eps=1e-6), nn.Conv2d(now, c.channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for level in self.down:
            for block in level.block: x = block(x)
            if hasattr(level, 'downsample'): x = level.downsample(x)
        x = self.mid.block_2(self.mid.attn_1(self.mid.block_1(x)))
        return self.conv_out(F.silu(self.norm_out(x)))


class VQDecoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        now, levels = c.ch*c.ch_mult[-1], []
        self.conv_in, self.mid = nn.Conv2d(c.channels, now, 3, padding=1), vq_mid(now)
        for level, mult in reversed(list(enumerate(c.ch_mult))):
            blocks = nn.ModuleList()
            for _ in range(c.vq_res_blocks + 1):
                blocks.append(VQRes(now, c.ch*mult))
                now = c.ch*mult
            levels.insert(0, bag(block=blocks, upsample=VQUp(now)) if level else bag(block=blocks))
        self.up = nn.ModuleList(levels)
        self.norm_out, self.conv_out = nn.GroupNorm(32, now, eps=1e-6), nn.Conv2d(now, c.image_channels, 3, padding=1)

    def forward(self, z):
        x = self.mid.block_2(self.mid.attn_1(self.mid.block_1(self.conv_in(z))))
        for level in reversed(self.up):
            for block in level.block: x = block(x)
            if hasattr(level, 'upsample'): x = level.upsample(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class FirstStage(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.encoder, self.decoder = VQEncoder(c), VQDecoder(c)
        self.quantize = bag(embedding=nn.Embedding(c.n_embed, c.channels))
        self.quant_conv, self.post_quant_conv = (nn.Conv2d(c.channels, c.channels, 1) for _ in range(2))

    def encode(self, x): return self.quant_conv(self.encoder(x))

    def decode(self, z):
        words = self.quantize.embedding.weight
        nearest = torch.cdist(z.permute(0, 2, 3, 1).reshape(-1, z.shape[1]).double(), words.double()).argmin(1)
        z = words[nearest].reshape(z.shape[0], *z.shape[2:], -1).permute(0, 3, 1, 2)
        return self.decoder(self.post_quant_conv(z))


# the whole model -------------------------------------------------------------------------------------------------------

class LatentDiffusion(nn.Module):
    "The three networks and the stored schedule, named as in the checkpoint."
    def __init__(self, c):
        super().__init__()
        self.c = c
        betas = torch.linspace(c.linear_start**.5, c.linear_end**.5, c.timesteps, dtype=torch.float64)**2
        a = (1 - betas).cumprod(0)
        before = torch.cat([torch.ones(1, dtype=a.dtype), a[:-1]])
        variance = betas*(1 - before)/(1 - a)
        stored = dict(betas=betas, alphas_cumprod=a, alphas_cumprod_prev=before, sqrt_alphas_cumprod=a.sqrt(),
            sqrt_one_minus_alphas_cumprod=(1 - a).sqrt(), log_one_minus_alphas_cumprod=(1 - a).log(), sqrt_recip_alphas_cumprod=a.rsqrt(),
            sqrt_recipm1_alphas_cumprod=(1/a - 1).sqrt(), posterior_variance=variance, posterior_log_variance_clipped=variance.clamp(min=1e-20).log(),
            posterior_mean_coef1=betas*before.sqrt()/(1 - a), posterior_mean_coef2=(1 - before)*(1 - betas).sqrt()/(1 - a))
        for name, value in stored.items(): self.register_buffer(name, value.float())
        self.model = bag(diffusion_model=UNet(c))
        self.first_stage_model = FirstStage(c)
        self.cond_stage_model = bag(embedding=nn.Embedding(c.n_classes, c.context_dim))

    def eps(self, x, t, labels): return self.model.diffusion_model(x, t, self.cond_stage_model.embedding(labels)[:, None])

    @torch.no_grad()
    def sample(self, x, labels, steps, guidance):
        "DDIM without noise, guided, as the original walks it; images in [-1,1]."
        times = torch.arange(0, self.c.timesteps, self.c.timesteps//steps) + 1 # more than `steps` where they do not divide
        before = torch.cat([torch.zeros(1, dtype=torch.long), times[:-1]])
        for t, s in reversed(list(zip(times.tolist(), before.tolist()))):
            now, then = self.alphas_cumprod[t].double(), self.alphas_cumprod[s].double()
            tt = torch.full((len(x),), t)
            e_null = self.eps(x, tt, torch.full_like(labels, self.c.n_classes - 1))
            e = e_null + guidance*(self.eps(x, tt, labels) - e_null)
            clean = (x - (1 - now).sqrt().float()*e)/now.sqrt().float()
            x = then.sqrt().float()*clean + (1 - then).sqrt().float()*e
        return self.first_stage_model.decode(x/self.c.scale_factor)


def write_keys(path, model):
    "Names and shapes of all tensors of the checkpoint, one a line."
    with open(path, 'w', newline='') as f:
        out = csv.writer(f, lineterminator='\n')
        out.writerow(['key', 'shape'])
        for k, v in model.state_dict().items(): out.writerow([k, 'x'.join(map(str, v.shape))])


def read_keys(path):
    "What `write_keys` wrote: name -> shape."
    with open(path, newline='') as f: return {r['key']: tuple(int(n) for n in r['shape'].split('x')) for r in csv.DictReader(f)}


if __name__ == '__main__': # python tests/ldm_original.py: writes the data file of names and shapes anew
    from aquatic_nb.models.ldm import LDMConfig
    with torch.device('meta'): write_keys(Path(__file__).parent/'data'/'ldm4_keys.csv', LatentDiffusion(LDMConfig()))
