"""What only a GPU can tell: `make gpu`, or `python tools/gpu.py [piece ...]`; `--list` names the pieces.

Each piece is a process of ten minutes at most that writes nbs/results/gpu_<card>_<piece>.csv; its first line names the command, the device, the driver,
the commit, the date, and whether it is complete. A piece whose file is complete is skipped; one that was stopped goes on after its last row, long work
from its folder in runs/gpu. `--once` works on one piece for ten minutes at most. Codes: 0 all complete, or no GPU here; 1 something failed (it is
said what); 3 pieces are left. What the pieces call is the library and tests/cuda_cases.py; nothing is computed here.
"""
import argparse, io, json, os, re, shutil, signal, subprocess, sys, tempfile, threading, time, traceback
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Callable
from xml.etree import ElementTree

root = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(root), str(root/'tests')]

import pandas as pd
import torch
from torch import nn

from aquatic_nb.act import attach_act
from aquatic_nb.aq import Scheme, decode
from aquatic_nb.core import generator, machine, write_atomic
from aquatic_nb.cuda import (aligned, decode_into, fused_ways, job_of, measure_choices, run_on, why_not_call, why_not_device)
from aquatic_nb.eval.samples import compare, labels_of, sample_images
from aquatic_nb.kaq import packable
from aquatic_nb.kernels.cuda_runtime import cuda_seconds, gpu
from aquatic_nb.ldm4 import CONFIGS, example_inputs, meta_model
from aquatic_nb.pack import quant_report
from aquatic_nb.quant import quantize_unet
from aquatic_nb.tune.distill import TuneConfig
from aquatic_nb.zoo import load_mini_classifier, load_mini_ldm
from cuda_cases import TOLERANCE, error, pack_randomly, random_case, random_layer, reference

MINUTES = 10                                        # of one process
DONE, FAILED, LEFT = 0, 1, 3                        # exit codes
MODELS = {'ldm4': 'LDM-4', 'sd15': 'SD 1.5', 'sdxl': 'SDXL'}
out, work = root/'nbs'/'results', root/'runs'/'gpu'

@dataclass(frozen=True)
class Piece:
    "Part of the measurements: `cases()` yields (name, function that returns the rows of that case)."
    what:str
    cases:Callable

PIECES = {}

# ---- correctness

def check_cases(numbers, backend, device):
    "Every way to run some random cases against float64, twice; the decode bit for bit. AssertionError names the case; returns what was seen."
    runs, worst = 0, dict.fromkeys(TOLERANCE, 0.)
    for i in numbers:
        layer, x = random_case(i)
        want, dense = reference(layer, x), decode(layer.aq, x.dtype)
        layer, x = layer.to(device), x.to(device)
        why, job = why_not_call(layer, x), job_of(layer, aligned(x))
        if why: raise AssertionError(f'case {i}: {why}')
        for how in fused_ways(layer.scheme, job, backend.chip.shared) + ['scratch']:
            y, again = (run_on(backend, layer, x, how) for _ in range(2))
            off, what = error(y.cpu(), want), f'case {i}, {how}, {layer}, input {list(x.shape)} {x.dtype}'
            if not off < TOLERANCE[x.dtype]: raise AssertionError(f'{what}: off by {off:.3g} of the largest value')
            if not torch.equal(y, again): raise AssertionError(f'{what}: two runs differ')
            runs, worst[x.dtype] = runs + 1, max(worst[x.dtype], off)
        if not torch.equal(decode_into(backend, layer, x, job).cpu(), dense): raise AssertionError(f'case {i}, {layer}: decoded weight differs')
    return [dict(runs=runs, largest_error_fp16=worst[torch.float16], largest_error_bf16=worst[torch.bfloat16])]


def kernels(part):
    for first in range(1000*part, 1000*(part + 1), 50): yield f'{first}..{first + 49}', partial(check_there, range(first, first + 50))

def check_there(numbers): return check_cases(numbers, gpu(0), 'cuda')

def pytest_rows(*args, prefix=()):
    "A row a test of what pytest is told to run; AssertionError where one fails."
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder)/'report.xml'
        done = subprocess.run([*prefix, sys.executable, '-m', 'pytest', '-q', f'--junitxml={report}', *args], cwd=root)
        if not report.exists(): raise RuntimeError(f'pytest {args} ended with code {done.returncode} and without a report')
        tests = list(ElementTree.parse(report).iter('testcase'))
    bad = [t.get('name') for t in tests if t.find('failure') is not None or t.find('error') is not None]
    if bad or done.returncode: raise AssertionError(f'{len(bad)} of {len(tests)} tests failed, code {done.returncode}: {bad[:5]}')
    return [dict(tests=len(tests), skipped=sum(t.find('skipped') is not None for t in tests), seconds=sum(float(t.get('time')) for t in tests))]

def cuda_tests():
    yield 'tests/test_cuda_host.py', partial(pytest_rows, 'tests/test_cuda_host.py')
    yield 'the slow ones', partial(pytest_rows, '-m', 'slow', 'tests/test_cuda_host.py')

def sanitized(tool):
    if shutil.which('compute-sanitizer') is None: return [dict(tool=tool, note='compute-sanitizer is not on PATH')]
    code = 'import gpu; print(gpu.check_there(range(0, 10000, 333)))'
    done = subprocess.run(['compute-sanitizer', '--tool', tool, '--error-exitcode', '9', sys.executable, '-c', code], cwd=root/'tools', capture_output=True, text=True)
    if done.returncode: raise AssertionError(f'compute-sanitizer {tool} ended with code {done.returncode}: {(done.stdout + done.stderr)[-2000:]}')
    return [dict(tool=tool, note='clean', said=done.stdout.strip().splitlines()[-1])]

def sanitizer():
    for tool in ('memcheck', 'racecheck', 'initcheck', 'synccheck'): yield tool, partial(sanitized, tool)

PIECES['tests'] = Piece('the tests of the CUDA kernels', cuda_tests)
for _part in range(10): PIECES[f'kernels-{_part}'] = Piece(f'the kernels against float64, random cases {1000*_part} to {1000*_part + 999}, twice', partial(kernels, _part))
PIECES['sanitizer'] = Piece('some of these cases under compute-sanitizer', sanitizer)

# ---- seconds of layers and of U-Nets

def calls_of(name):
    "The different layers of a full-size U-Net, as it calls them: {(kind, O, I, stride): shape of the input, batch 1}."
    model, found = meta_model(name), {}
    def see(module, args):
        kind = 'linear' if isinstance(module, nn.Linear) else {(1, 1): 'conv1x1', (3, 3): 'conv3x3'}[module.kernel_size]
        stride = 1 if kind == 'linear' else module.stride[0]
        found.setdefault((kind, *module.weight.shape[:2], stride, tuple(args[0].shape)), None)
    hooks = [m.register_forward_pre_hook(see) for m in packable(model).values()]
    with torch.no_grad(): model(**example_inputs(model, CONFIGS[name]['tokens']))
    for h in hooks: h.remove()
    return list(found)

def layer_rows(call, images, last):
    kind, O, I, stride, (_, *shape) = call
    scheme = Scheme(2, 9, 9) if kind == 'conv3x3' else Scheme(2, 8, 8)
    layer = random_layer(kind, scheme, O, I, generator(0, 'layer'), stride=stride).cuda()
    xs = [torch.randn(2*images, *shape, device='cuda').half() for _ in range(3)]               # two for guidance
    if last and len(shape) == 3: xs = [x.to(memory_format=torch.channels_last) for x in xs]
    return [dict(images=images, stride=stride) | row for row in measure_choices(layer, xs)]

def layers(name, images):
    for call in calls_of(name):
        for last in (False, True)[call[0] == 'linear':]: yield f"{call} {'channels last' if last else ''}", partial(layer_rows, call, images, last)

def choice_rows():
    "The table that the dispatch reads: the fastest way of each call, where it has been measured."
    files = [path for path in out.glob(f'gpu_{card()}_layers-*.csv')]
    if not files: raise RuntimeError('no layers have been measured; run the pieces called layers-... first')
    rows = pd.concat([pd.read_csv(path, comment='#') for path in files])
    return rows[['chip', 'kind', 'O', 'N', 'tokens', 'how']].drop_duplicates(['chip', 'kind', 'O', 'N', 'tokens']).to_dict('records')

def dense_unet(name, dtype=torch.float16):
    "A full-size U-Net with random weights, on the device."
    import diffusers
    torch.cuda.empty_cache()
    with torch.device('cuda'): model = getattr(diffusers, CONFIGS[name]['cls'])(**CONFIGS[name]['config'])
    return model.to(dtype).to(memory_format=torch.channels_last).eval().requires_grad_(False)

def inputs_of(model, tokens, n, seed=0):
    "One call of a U-Net with random inputs for n samples."
    g = generator(seed, 'inputs')
    like = lambda t: torch.randn(n, *t.shape[1:], generator=g).to('cuda', model.dtype) if t.is_floating_point() else torch.full((n,), 500, device='cuda')
    made = {k: {a: like(b) for a, b in v.items()} if isinstance(v, dict) else like(v) for k, v in example_inputs(model, tokens).items()}
    return made | {'sample': made['sample'].to(memory_format=torch.channels_last)}

WAYS = {'fp16': None, 'W2': (2, None), 'W2A8': (2, 8), 'W4': (4, None)}                     # codebooks of a code of 8 bits or so, activation bits

@lru_cache(1)
def unet_of(name, way):
    model = dense_unet(name)
    if WAYS[way] is None: return model
    n_codebooks, act_bits = WAYS[way]
    pack_randomly(model, generator(0, 'codes'), n_codebooks)
    if act_bits: attach_act(model, act_bits, [inputs_of(model, CONFIGS[name]['tokens'], 2)], n_buckets=1)
    return model

def unet_rows(name, way, images):
    model = unet_of(name, way)
    torch.cuda.empty_cache(); torch.cuda.reset_peak_memory_stats()
    batches = [inputs_of(model, CONFIGS[name]['tokens'], 2*images, seed) for seed in range(2)]  # two for guidance
    try:
        with torch.no_grad(): seconds = cuda_seconds([partial(model, **b, return_dict=False) for b in batches], rounds=2)
    except torch.cuda.OutOfMemoryError: return [dict(model=name, way=way, images=images, note='out of memory')]
    weights = sum(t.nbytes for t in model.state_dict().values())
    return [dict(model=name, way=way, images=images, ms=seconds*1e3, images_per_s_of_20_steps=images/seconds/20,
                 peak_MB=torch.cuda.max_memory_allocated()/1e6, weights_MB=weights/1e6)]

def unets(name):
    for way in WAYS:
        for images in (2, 16, 64): yield f'{way}, {images} images', partial(unet_rows, name, way, images)

def ceilings():
    a, big = torch.randn(8192, 8192, device='cuda').half(), torch.empty(2**30, dtype=torch.uint8, device='cuda')
    other = torch.empty_like(big)
    return [dict(copy_GBps=2*2**30/cuda_seconds([lambda: other.copy_(big)])/1e9, fp16_product_TFLOPs=2*8192**3/cuda_seconds([lambda: a @ a])/1e12)]

PIECES['ceilings'] = Piece('what the card reaches: a copy, and a product of cuBLAS', lambda: [('copy and product', ceilings)])
for _short, _name in MODELS.items():
    for _images in (2, 16, 64): PIECES[f'layers-{_short}-b{_images}'] = Piece(f'every way to run the layers of {_name}, {_images} images', partial(layers, _name, _images))
PIECES['choices'] = Piece('the measured table for the dispatch, out of these', lambda: [('all', choice_rows)])
for _short, _name in MODELS.items(): PIECES[f'unet-{_short}'] = Piece(f'the U-Net of {_name}: fp16, W2, W2A8, W4 at 2, 16, 64 images', partial(unets, _name))

# ---- encoding and tuning, long: they go on from their folders

class Spent:
    "Seconds and peak memory of work that may be stopped at any moment, added up over its processes."
    def __init__(self, folder):
        self.file = Path(folder)/'spent.json'
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.before = json.loads(self.file.read_text()) if self.file.exists() else dict(seconds=0., peak_MB=0., processes=0)
        self.start, self.over = time.monotonic(), threading.Event()

    def now(self):
        b, peak = self.before, torch.cuda.max_memory_allocated()/1e6 if torch.cuda.is_available() else 0.
        return dict(seconds=b['seconds'] + time.monotonic() - self.start, peak_MB=max(b['peak_MB'], peak), processes=b['processes'] + 1)

    def _write(self):
        while not self.over.wait(2): write_atomic(self.file, json.dumps(self.now()).encode())

    def __enter__(self): threading.Thread(target=self._write, daemon=True).start(); return self
    def __exit__(self, *error): self.over.set(); write_atomic(self.file, json.dumps(self.now()).encode())

def encode_rows(name, case, options):
    "`quantize_unet` from end to end on random weights, calibrated on walks that it makes itself."
    folder = work/f'encode {name} {case}'
    with Spent(folder) as spent:
        torch.manual_seed(0)                                   # weights of a random model, the same in every process
        model = dense_unet(name, torch.float32)
        quantize_unet(model, work_dir=folder/'layers', seed=0, **options)
    return [dict(model=name, case=case, bits=quant_report(model).attrs['bits'], minutes=spent.now()['seconds']/60) | spent.now()]

ENCODED = {'W2, one setting': dict(bits=2.2, laq=False), 'W2': dict(bits=2), 'W2A8': dict(bits=2, act_bits=8)}

def encodings(name):
    for case, options in ENCODED.items(): yield case, partial(encode_rows, name, case, options)

FULL = TuneConfig(steps=20_000, batch=64, bf16=True)

def tuned_rows(bits, act_bits, n=2000):
    "The shipped model tuned by the full recipe, and judged on n images against full precision."
    folder, pipe = work/f'tuned {bits:g} {act_bits}', load_mini_ldm().to('cuda')
    sampling, truth = dict(n=n, steps=20, guidance_scale=1.5, seed=0), folder/'truth.pt'
    folder.mkdir(parents=True, exist_ok=True)
    if not truth.exists(): write_atomic(truth, lambda path: torch.save(sample_images(pipe, **sampling), path))
    with Spent(folder) as spent: quantize_unet(pipe.unet, bits, act_bits=act_bits, calibration=pipe, tune=FULL, work_dir=folder/'layers', seed=0)
    pipe.unet.save_pretrained(folder/'model')
    found = compare(sample_images(pipe, **sampling), torch.load(truth), load_mini_classifier(), labels_of(pipe, n))
    return [dict(bits=quant_report(pipe.unet).attrs['bits'], act_bits=act_bits or 16, images=n, recipe=str(FULL)) | found | spent.now()]

for _short, _name in MODELS.items(): PIECES[f'encode-{_short}'] = Piece(f'quantize_unet from end to end at the size of {_name}, random weights', partial(encodings, _name))
for _bits, _act in ((2, None), (2, 8), (1.5, 8)):
    _case = f'W{_bits:g}' + (f'A{_act}' if _act else '')
    PIECES[f'tuned-{_case.lower()}'] = Piece(f'the shipped model at {_case}: 20,000 steps of batch 64, judged on 2,000 images', lambda b=_bits, a=_act: [('tuned', partial(tuned_rows, b, a))])

# ---- files, and the order of things

def said_by(*cmd):
    try: return subprocess.run(cmd, cwd=root, capture_output=True, text=True).stdout.strip()
    except OSError: return ''

def card(): return re.sub(r'\W+', '', gpu(0).chip.name.lower())

def head(name, complete):
    "The first line of a piece's file."
    commit = said_by('git', 'rev-parse', '--short', 'HEAD') or 'no git'
    changed = ' and changes' if said_by('git', 'status', '--porcelain', '--untracked-files=no', 'aquatic_nb', 'tests', 'tools') else ''
    driver = said_by('nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader').splitlines()
    return (f"# make gpu, piece {name}; {torch.cuda.get_device_name()}, driver {driver[0] if driver else 'unknown'}, CUDA {torch.version.cuda}; "
            f"commit {commit}{changed}; {time.strftime('%Y-%m-%d')}; {machine()}; {'complete' if complete else 'unfinished'}")

def is_complete(path): return path.exists() and path.read_text().splitlines()[0].endswith('; complete')

def read(path): return pd.read_csv(path, comment='#').to_dict('records') if path.exists() and len(path.read_text().splitlines()) > 1 else []

def go_on(name, path, seconds, stamp=head):
    "Work on a piece, case after case, until it is complete (True) or the time is over (False); the file is whole after each case."
    rows, start = read(path), time.monotonic()
    done = {r['case_name'] for r in rows}
    def put(complete):
        text = io.StringIO(); pd.DataFrame(rows).to_csv(text, index=False)
        write_atomic(path, (stamp(name, complete) + '\n' + (text.getvalue() if rows else '')).encode())
    for case, make in PIECES[name].cases():
        if case in done: continue
        if time.monotonic() - start > seconds: put(False); return False
        rows += [{'case_name': case} | row for row in make()]
        put(False)
    put(True)
    return True

def why_not():
    "Why nothing can be measured here, in one sentence; None where it can."
    if not torch.cuda.is_available(): return 'There is no CUDA device here, so nothing was measured.'
    why = why_not_device('cuda', torch.float16, torch.cuda.get_device_capability())
    return why and f'Nothing was measured: {why}.'

def mark():
    "Changes when anything was written: rows, or the folders of long work."
    return sorted((str(p), p.stat().st_mtime_ns) for folder in (out, work) for p in folder.rglob('*') if p.is_file() and p.name != 'spent.json')

def process(name, command=None, minutes=MINUTES):
    "A process that works on one piece; it and what it started are stopped when its time is over, which counts as LEFT."
    child = subprocess.Popen(command or [sys.executable, __file__, '--work', name], cwd=root, start_new_session=True)
    try: return child.wait(60*minutes)
    except subprocess.TimeoutExpired: return LEFT
    finally:
        if child.poll() is None: os.killpg(child.pid, signal.SIGKILL); child.wait()

def slices(name):
    "Processes of ten minutes until a piece is complete; returns DONE, FAILED or, after two that wrote nothing, LEFT."
    idle = 0
    while idle < 2:
        before = mark()
        code = process(name)
        if code not in (DONE, LEFT): return FAILED
        if code == DONE: return DONE
        idle = 0 if mark() != before else idle + 1
    return LEFT

def main(args=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('pieces', nargs='*', metavar='piece', help='some of those that --list names (all)')
    p.add_argument('--list', action='store_true', help='name the pieces')
    p.add_argument('--once', action='store_true', help='one process of ten minutes at most, on the first piece that is not complete')
    p.add_argument('--work', action='store_true', help=argparse.SUPPRESS)
    args = p.parse_args(args)
    if args.list: print('\n'.join(f'{k:16} {o.what}' for k, o in PIECES.items())); return DONE
    if unknown := sorted(set(args.pieces) - PIECES.keys()): p.error(f"no piece named {', '.join(unknown)}; --list names them")
    if why := why_not(): print(why); return DONE
    file = lambda name: out/f'gpu_{card()}_{name}.csv'
    todo, codes = [name for name in args.pieces or PIECES if not is_complete(file(name))], {}
    if args.work:
        try: return DONE if all(go_on(name, file(name), 60*MINUTES - 90) for name in todo) else LEFT
        except Exception: traceback.print_exc(); return FAILED
    for name in todo[:1] if args.once else todo:
        print(f'--- {name}: {PIECES[name].what}', flush=True)
        codes[name] = process(name) if args.once else slices(name)
    if failed := [n for n, c in codes.items() if c == FAILED]: print('failed: ' + ', '.join(failed)); return FAILED
    left = [n for n in args.pieces or PIECES if not is_complete(file(n))]
    print(f"left: {', '.join(left)}" if left else 'everything is measured')
    return LEFT if left else DONE

if __name__ == '__main__': sys.exit(main())
