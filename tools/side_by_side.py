"""Seconds, memory and bytes of two whole U-Nets with random weights, run by everybody: python tools/side_by_side.py

Each row is a process of its own, so that its peak memory is its own; rows that the table has already stay. What a package needs is
the extra `bench`, and `stable-diffusion-cpp-python`, which is compiled when it is installed and therefore in no extra.
"""
import argparse
import contextlib
import json
import math
import os
import resource
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
LDM4 = dict(sample_size=64, in_channels=3, out_channels=3, block_out_channels=(192, 384, 576, 960), layers_per_block=2,
            down_block_types=('DownBlock2D',) + ('CrossAttnDownBlock2D',)*3,
            up_block_types=('CrossAttnUpBlock2D',)*3 + ('UpBlock2D',), cross_attention_dim=512, attention_head_dim=1)
MODELS = {'LDM-4': (LDM4, 1), 'SD-1.5': (None, 77)}   # and tokens of the condition
HELD = contextlib.ExitStack()                          # a narrower width, for as long as the process lasts
OURS = {'ours W2': (2, False), 'ours W2A8': (2, True), 'ours W4': (4, False)}
CPP = {f'stable-diffusion.cpp {k}': k for k in ('f32', 'f16', 'q8_0', 'q4_0', 'q2_k')}
WAYS = ['torch fp32', 'torch bf16', 'OpenVINO fp32', 'OpenVINO int8', *CPP, 'sdnq int8', *OURS]
COLUMNS = ['model', 'way', 'batch', 'threads', 'simd', 'step_s', 'step_cpu_s', 'first_s', 'peak_mib', 'file_mb', 'width', 'package',
           'load', 'date', 'note']


# ---------------------------------------------------------------- a row, in a process of its own

def config_of(model):
    "What makes its U-Net."
    if MODELS[model][0] is not None: return MODELS[model][0]
    found = json.loads((HERE/'aquatic_nb/assets/configs/sd15/unet/config.json').read_text())
    return {k: v for k, v in found.items() if not k.startswith('_')}


def fill(tensor, scale):
    "Random numbers, a short run of them again and again: drawing 900 million takes longer than a step."
    import torch
    flat = tensor.view(-1)
    some = torch.randn(min(len(flat), 65521))*scale
    for i in range(0, len(flat), len(some)): flat[i:i + len(some)] = some[:len(flat) - i]


def dense(model):
    "A U-Net of random weights."
    import torch
    from diffusers import UNet2DConditionModel
    with torch.device('meta'): unet = UNet2DConditionModel(**config_of(model))
    unet = unet.to_empty(device='cpu').eval().requires_grad_(False)
    for p in unet.parameters():
        if p.dim() > 1: fill(p.data, p[0].numel()**-.5)
        else: p.data.fill_(1.)
    for n, p in unet.named_parameters():
        if n.endswith('bias'): p.data.zero_()
    return unet


def packed(model, codebooks, a8):
    "The same with random codes; no dense weight is ever made. Also the bytes of what a file holds."
    import torch
    from diffusers import UNet2DConditionModel
    from torch import nn

    from aquatic_nb.act import ActQuant
    from aquatic_nb.aq import AQTensor, Scheme
    from aquatic_nb.layers import AQConv2d, AQLinear, swap
    with torch.device('meta'): unet = UNet2DConditionModel(**config_of(model))
    for name, m in list(unet.named_modules()):
        if not isinstance(m, (nn.Conv2d, nn.Linear)): continue
        s = Scheme(codebooks, 9, 9) if getattr(m, 'kernel_size', 0) == (3, 3) else Scheme(codebooks, 8, 8)
        O, N = len(m.weight), m.weight[0].numel()
        meta = dict(device='meta')
        aq = AQTensor(torch.empty(O, -(-N//s.group_size), codebooks, dtype=torch.int16, **meta),
                      torch.empty(codebooks, s.n_codewords, s.group_size, dtype=torch.int8, **meta),
                      torch.empty(O, dtype=torch.float16, **meta), tuple(m.weight.shape), s)
        new = (AQConv2d if isinstance(m, nn.Conv2d) else AQLinear)(m, aq)
        if a8: new.act = ActQuant(8, [0], torch.tensor([[.04]]), torch.tensor([[120.]]))
        swap(unet, name, new)
    def filled(owner, name, p):
        if name == 'codebooks': return torch.randint(-(126//codebooks), 126//codebooks + 1, p.shape).to(torch.int8)
        if p.dtype == torch.uint8: return torch.randint(0, 256, p.shape, dtype=torch.uint8)
        if name == 'scales': return torch.full(p.shape, .7/(52*math.prod(owner.weight_shape[1:])**.5)).half()
        if p.dim() > 1: return torch.randn(p.shape)*p[0].numel()**-.5
        return torch.zeros(p.shape) if name == 'bias' else torch.ones(p.shape)
    for m in unet.modules():
        for name, p in list(m.named_parameters(recurse=False)):
            if p.is_meta: setattr(m, name, nn.Parameter(filled(m, name, p), requires_grad=False))
    return unet.eval()


def size_of(module): return sum(p.nbytes for p in (*module.parameters(), *module.buffers()))


def by_torch(model, way, work):
    import torch
    if way in OURS:
        unet = packed(model, *OURS[way])
        import aquatic_nb.cpu  # noqa: F401  the kernels
        return unet, size_of(unet), torch.float32
    unet = dense(model)
    if way == 'torch bf16': return unet.bfloat16(), size_of(unet)//1, torch.bfloat16
    if way == 'sdnq int8':
        os.environ['SDNQ_USE_TORCH_COMPILE'] = '0'
        from sdnq import sdnq_post_load_quant
        unet = sdnq_post_load_quant(unet, weights_dtype='int8', quant_conv=True, use_quantized_matmul=True,
                                    use_quantized_matmul_conv=True)
    return unet, size_of(unet), torch.float32


def by_openvino(model, way, batch, threads, work):
    "A function of latents, time and condition; the converted model is kept in `work` for the next row."
    import openvino as ov
    import torch
    kept = Path(work)/f'{model}-{way[-4:]}.xml'
    if not kept.exists():
        unet, tokens = dense(model), MODELS[model][1]
        c = unet.config
        class Positional(torch.nn.Module):
            def __init__(self): super().__init__(); self.unet = unet
            def forward(self, x, t, cond): return self.unet(x, t, cond, return_dict=False)[0]
        example = (torch.zeros(1, c.in_channels, c.sample_size, c.sample_size), torch.tensor(500),
                   torch.zeros(1, tokens, c.cross_attention_dim))
        made = ov.convert_model(Positional().eval(), example_input=example)
        if way.endswith('int8'):
            import nncf
            made = nncf.compress_weights(made)
        ov.save_model(made, kept, compress_to_fp16=False)
        return 'converted'                      # the next process measures
    settings = {'INFERENCE_NUM_THREADS': threads, 'INFERENCE_PRECISION_HINT': 'f32'}
    run = ov.Core().compile_model(kept, 'CPU', settings)
    return lambda x, t, c: run([x.numpy(), t.numpy(), c.numpy()])[0], kept.with_suffix('.bin').stat().st_size


def by_cpp(model, way, batch, threads, steps, work):
    "stable-diffusion.cpp: it makes a whole picture, so the process ends after the steps that are timed."
    if model == 'LDM-4': return dict(note='it knows no class-conditional LDM: there is no such architecture in it')
    import stable_diffusion_cpp as sd
    folder = Path(work)/'sd15'
    if not folder.exists():
        import torch
        from diffusers import AutoencoderKL
        from transformers import CLIPTextConfig, CLIPTextModel
        from safetensors.torch import save_file
        def saved(module, name):
            for p in module.parameters():
                if p.dim() > 1: fill(p.data, p[0].numel()**-.5)
            (folder/name).mkdir(parents=True, exist_ok=True)
            file = {'text_encoder': 'model'}.get(name, 'diffusion_pytorch_model')
            save_file({k: v.contiguous() for k, v in module.half().state_dict().items()}, folder/name/f'{file}.safetensors')
        (folder).mkdir(parents=True)
        blocks = dict(down_block_types=['DownEncoderBlock2D']*4, up_block_types=['UpDecoderBlock2D']*4)
        saved(AutoencoderKL(block_out_channels=[128, 256, 512, 512], layers_per_block=2, latent_channels=4, **blocks), 'vae')
        saved(CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                                           num_attention_heads=12)), 'text_encoder')
        unet = dense(model)
        saved(unet, 'unet')
        (folder/'model_index.json').write_text('{"_class_name": "StableDiffusionPipeline"}')
        del unet
        torch.manual_seed(0)
        return 'converted'
    marks, cpu = [], []
    def progress(step, of, took):
        if of > steps + 1: return
        marks.append(time.perf_counter()); cpu.append(time.process_time())
        if step <= steps: return
        seconds = [b - a for a, b in zip(marks, marks[1:])]
        print(json.dumps(dict(step_s=sorted(seconds)[len(seconds)//2], step_cpu_s=(cpu[-1] - cpu[0])/(len(cpu) - 1),
                              peak_mib=peak(), note='two calls of batch 1 a step' if batch == 2 else '')), flush=True)
        os._exit(0)
    pipe = sd.StableDiffusion(model_path=str(folder), n_threads=threads, wtype=CPP[way], verbose=True)
    pipe.generate_image('a photo', width=512, height=512, sample_steps=steps + 1, cfg_scale=7. if batch == 2 else 1.,
                        sample_method='euler', progress_callback=progress)
    return dict(note='it ended without a step')


def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024


def version_of(way):
    from importlib.metadata import version
    name = next((p for k, p in {'OpenVINO': 'openvino', 'stable': 'stable-diffusion-cpp-python', 'sdnq': 'sdnq',
                                'torch': 'torch', 'ours': 'aquatic-nb'}.items() if way.startswith(k)))
    return f'{name} {version(name)}'


def one(model, way, batch, threads, steps, work):
    "Measure a row in this process; prints it."
    import aquatic_nb.core  # noqa: F401  first: it sees to a torchvision that does not fit this torch
    row = dict(package=version_of(way))
    if way in CPP:
        made = by_cpp(model, way, batch, threads, steps, work)
        return print(json.dumps(row | (dict(again=True) if made == 'converted' else made)))
    import torch
    torch.set_num_threads(threads)
    kind = torch.float32
    if way.startswith('OpenVINO'):
        made = by_openvino(model, way, batch, threads, work)
        if made == 'converted': return print(json.dumps(dict(again=True)))
        call, size = made
    else:
        unet, size, kind = by_torch(model, way, work)
        def call(x, t, c): return unet(x, t, c).sample
    if way in OURS:
        from aquatic_nb.kernels.simd import use_width, width
        if os.environ.get('ONEDNN_MAX_CPU_ISA') == 'AVX2': HELD.enter_context(use_width('avx2', 'vpmaddwd'))   # no VNNI
        row['width'] = f'{width().name} {width().dot}'
    else: row['width'] = torch.backends.cpu.get_cpu_capability()
    c, tokens = config_of(model), MODELS[model][1]
    x = torch.randn(batch, c['in_channels'], c['sample_size'], c['sample_size']).to(kind)
    cond, t, wall, cpu = torch.randn(batch, tokens, c['cross_attention_dim']).to(kind), torch.tensor(500), [], []
    with torch.no_grad():
        start = time.perf_counter()
        for _ in range(2 if way in OURS else 1): call(x, t, cond)      # weights are kept at the first, and widened at the second
        first = time.perf_counter() - start
        for _ in range(steps):
            a, b = time.perf_counter(), time.process_time()
            call(x, t, cond)
            wall.append(time.perf_counter() - a); cpu.append(time.process_time() - b)
    print(json.dumps(row | dict(step_s=sorted(wall)[steps//2], step_cpu_s=sorted(cpu)[steps//2], first_s=first, peak_mib=peak(),
                                file_mb=size/1e6)))


# ---------------------------------------------------------------- the table

def read(path):
    import pandas as pd
    return pd.read_csv(path, comment='#', keep_default_na=False) if Path(path).exists() else pd.DataFrame(columns=COLUMNS)


def write(path, table, command):
    from aquatic_nb.core import machine, write_atomic
    head = (f'# command: {command}\n# date: {max(table.date)}\n# machine: {machine()}; shared with other work (`load` is the average '
            'of the minute before): compare CPU seconds, step_cpu_s; with two threads they count both\n'
            "# simd: all that the processor has, or 'avx2': forced (torch's libraries by their switches, our kernels at 8 lanes)\n"
            '# random weights; step_s, step_cpu_s: median of the timed calls of the U-Net; file_mb: stored tensors\n')
    write_atomic(path, (head + table.to_csv(index=False, float_format='%.4g')).encode())


def run(args, model, way, batch, threads):
    "A row, by a process of its own (a second one where the first only converted)."
    call = [sys.executable, __file__, '--one', model, way, str(batch), str(threads), '--steps', str(args.steps), '--work', args.work]
    env = {**os.environ, 'OMP_NUM_THREADS': str(threads), 'PYTHONPATH': os.pathsep.join(sys.path[1:])}
    if args.simd == 'avx2':
        env |= dict(ONEDNN_MAX_CPU_ISA='AVX2', ATEN_CPU_CAPABILITY='avx2', MKL_ENABLE_INSTRUCTIONS='AVX2')
    row = dict(model=model, way=way, batch=batch, threads=threads, simd=args.simd, date=str(date.today()), load=round(os.getloadavg()[0], 1))
    for _ in range(2):
        try: done = subprocess.run(call, capture_output=True, text=True, env=env, timeout=args.limit)
        except subprocess.TimeoutExpired: return row | dict(note=f'not within {args.limit} s')
        lines = [o for o in done.stdout.splitlines() if o.startswith('{')]
        if not lines:
            last = (done.stderr.strip().splitlines() or [f'ended with {done.returncode}'])[-1]
            return row | dict(note=f'failed: {last[:160]}')
        found = json.loads(lines[-1])
        if not found.pop('again', False): return row | found
    return row | dict(note='failed: converted twice')


def main():
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument('--out', default='nbs/results/side_by_side.csv', help='the table; rows in it stay')
    ask.add_argument('--work', default='/tmp/side_by_side', help='folder for converted models (10 GB)')
    ask.add_argument('--steps', type=int, default=3, help='timed calls a row')
    ask.add_argument('--limit', type=int, default=3600, help='seconds that a row may take')
    ask.add_argument('--models', nargs='*', default=list(MODELS))
    ask.add_argument('--ways', nargs='*', default=WAYS)
    ask.add_argument('--threads', nargs='*', type=int, default=[1, 2])
    ask.add_argument('--batches', nargs='*', type=int, default=[1, 2])
    ask.add_argument('--simd', default='all', choices=['all', 'avx2'],
                     help="'avx2': torch's libraries and our kernels as on a processor of 8 lanes without 8-bit dot products")
    ask.add_argument('--one', nargs=4, help=argparse.SUPPRESS)
    args = ask.parse_args()
    if args.one: return one(*args.one[:2], *map(int, args.one[2:]), args.steps, args.work)
    import pandas as pd
    Path(args.work).mkdir(parents=True, exist_ok=True)
    for model in args.models:
        for threads in args.threads:
            for batch in args.batches:
                for way in args.ways:
                    table = read(args.out)
                    if ((table.model == model) & (table.way == way) & (table.batch == batch) & (table.threads == threads)
                        & (table.simd == args.simd)).any(): continue
                    row = run(args, model, way, batch, threads)
                    print(row, flush=True)
                    table = pd.DataFrame([*read(args.out).to_dict('records'), row], columns=COLUMNS)
                    write(args.out, table, f'python tools/side_by_side.py --steps {args.steps}')


if __name__ == '__main__': main()
