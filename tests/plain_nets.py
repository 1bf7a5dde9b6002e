"A U-Net as research code writes them: plain modules, 1x1 Conv1d in einsum attention, half of it in subclasses and closures; nothing of diffusers."
import math

import torch
from torch import nn

class Norm32(nn.GroupNorm):
    def forward(self, x): return super().forward(x.float()).type(x.dtype)

def embed(t, dim):
    freqs = torch.exp(-math.log(10000)*torch.arange(dim//2, dtype=torch.float32)/(dim//2)).to(t.device)
    args = t[:, None].float()*freqs[None]
    return torch.cat([args.cos(), args.sin()], -1)

class Takes(nn.Module): "A block whose forward takes the embedding, too."

class Steps(nn.Sequential, Takes):
    def forward(self, x, emb):
        for layer in self: x = layer(x, emb) if isinstance(layer, Takes) else layer(x)
        return x

class Res(Takes):
    def __init__(self, ch, emb, out):
        super().__init__()
        self.in_layers = nn.Sequential(Norm32(8, ch), nn.SiLU(), nn.Conv2d(ch, out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, 2*out))
        self.out_layers = nn.Sequential(Norm32(8, out), nn.SiLU(), nn.Dropout(.1), nn.Conv2d(out, out, 3, padding=1))
        self.skip_connection = nn.Identity() if out == ch else nn.Conv2d(ch, out, 1)
    def forward(self, x, emb):
        h = self.in_layers(x)
        scale, shift = self.emb_layers(emb).type(h.dtype)[..., None, None].chunk(2, 1)
        norm, rest = self.out_layers[0], self.out_layers[1:]
        return self.skip_connection(x) + rest(norm(h)*(1 + scale) + shift)

class Attention(nn.Module):
    def __init__(self, ch, heads):
        super().__init__()
        self.heads, self.norm = heads, Norm32(8, ch)
        self.qkv, self.proj_out = nn.Conv1d(ch, 3*ch, 1), nn.Conv1d(ch, ch, 1)
    def forward(self, x):
        b, c, *spatial = x.shape
        x = x.reshape(b, c, -1)
        q, k, v = self.qkv(self.norm(x)).reshape(b*self.heads, 3*c//self.heads, -1).chunk(3, 1)
        weight = torch.einsum('bct,bcs->bts', q, k)/math.sqrt(c/self.heads)
        h = torch.einsum('bts,bcs->bct', weight.float().softmax(-1).type(weight.dtype), v).reshape(b, c, -1)
        return (x + self.proj_out(h)).reshape(b, c, *spatial)

class Down(nn.Module):
    def __init__(self, ch): super().__init__(); self.op = nn.Conv2d(ch, ch, 3, stride=2, padding=1)
    def forward(self, x): return self.op(x)

class Up(nn.Module):
    def __init__(self, ch): super().__init__(); self.conv = nn.Conv2d(ch, ch, 3, padding=1)
    def forward(self, x): return self.conv(nn.functional.interpolate(x, scale_factor=2, mode='nearest'))

class ResearchUNet(nn.Module):
    "`forward(x, timesteps, y=None)`, as guided diffusion has it."
    def __init__(self, ch=32, mult=(1, 2), blocks=1, attend=(1,), classes=10):
        super().__init__()
        emb = 4*ch
        self.ch, self.time_embed = ch, nn.Sequential(nn.Linear(ch, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.label_emb = nn.Embedding(classes, emb)
        self.input_blocks, widths, now = nn.ModuleList([Steps(nn.Conv2d(3, ch, 3, padding=1))]), [ch], ch
        for level, m in enumerate(mult):
            for _ in range(blocks):
                self.input_blocks.append(Steps(Res(now, emb, m*ch), *[Attention(m*ch, 4)]*0, *([Attention(m*ch, 4)] if level in attend else [])))
                now = m*ch; widths.append(now)
            if level < len(mult) - 1: self.input_blocks.append(Steps(Down(now))); widths.append(now)
        self.middle_block = Steps(Res(now, emb, now), Attention(now, 4), Res(now, emb, now))
        self.output_blocks = nn.ModuleList()
        for level, m in reversed(list(enumerate(mult))):
            for i in range(blocks + 1):
                parts = [Res(now + widths.pop(), emb, m*ch)]; now = m*ch
                if level in attend: parts.append(Attention(now, 4))
                if level and i == blocks: parts.append(Up(now))
                self.output_blocks.append(Steps(*parts))
        self.out = nn.Sequential(Norm32(8, now), nn.SiLU(), nn.Conv2d(now, 3, 3, padding=1))
    def forward(self, x, timesteps, y=None):
        hs, emb = [], self.time_embed(embed(timesteps, self.ch))
        if y is not None: emb = emb + self.label_emb(y)
        for block in self.input_blocks: x = block(x, emb); hs.append(x)
        x = self.middle_block(x, emb)
        for block in self.output_blocks: x = block(torch.cat([x, hs.pop()], 1), emb)
        return self.out(x)
