"""The tables that README shows, remade: `make results`, or `python tools/results.py [row ...]`; `--plan` tells what it would cost, and what makes the others.

Rows are made in turn and written to nbs/results/shipped.csv as they come; a run that was stopped goes on where it was, from runs/results (encoded layers,
checkpoints of training, images). Budgets are seconds of processor time, so a busy machine changes nothing; ours and the trained peer are compared
twice, after as many steps and after as many seconds, encoding included, each at the best learning rate of the same grid, found on held-out walks.
"""
import argparse, copy, gc, io, json, math, sys, threading, time
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Callable

root = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(root))

import numpy as np
import pandas as pd
import torch

from aquatic_nb.act import attach_act
from aquatic_nb.bench import PEER_TUNED, PEERS, TUNED, count_bits, our_unet
from aquatic_nb.calib import calibration_batches
from aquatic_nb.core import Run, commit, stamp, write_atomic
from aquatic_nb.eval.samples import compare, labels_of, sample_images
from aquatic_nb.eval.uniform import straight_through
from aquatic_nb.hub import attach
from aquatic_nb.layers import packed_layers, stored_sizes
from aquatic_nb.probe import split_points, thinned, timestep_weights
from aquatic_nb.tune.distill import Teacher, distill
from aquatic_nb.tune.layers import opened_layers
from aquatic_nb.zoo import load_mini_classifier, load_mini_ldm

IMAGES, PART = 2000, 64                             # of a row; drawn at once and kept in one file
MINUTES = 10                                        # of processor time that tuning has
RATES, SEARCH = (3e-4, 1e-3, 3e-3, 1e-2), 100       # learning rates that are tried, and steps of a trial
SAMPLING = dict(steps=20, guidance_scale=1.5, seed=0)
out, tried, work = root/'nbs'/'results'/'shipped.csv', root/'nbs'/'results'/'shipped_rates.csv', root/'runs'/'results'
COLUMNS = ['method', 'bits', 'bits_all', 'file_mb', 'images', 'psnr', 'psnr_se', 'psnr_mean', 'psnr_mean_se', 'accuracy', 'accuracy_low',
           'accuracy_high', 'steps', 'lr', 'encode_cpu_s', 'train_cpu_s', 'search_cpu_s', 'commit', 'date']

class Spent:
    "Processor seconds of work that may be stopped at any moment, added up over its processes."
    def __init__(self, folder, name='spent'):
        self.file = Path(folder)/f'{name}.json'
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.before = json.loads(self.file.read_text()) if self.file.exists() else 0.
        self.start, self.over = time.process_time(), threading.Event()

    @property
    def seconds(self): return self.before + time.process_time() - self.start

    def _write(self):
        while not self.over.wait(2): write_atomic(self.file, json.dumps(self.seconds).encode())

    def __enter__(self):
        self.thread = threading.Thread(target=self._write, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.over.set()
        self.thread.join()
        write_atomic(self.file, json.dumps(self.seconds).encode())

# ---- what rows are made of

@dataclass
class Made:
    "A U-Net that can be sampled from, and what it took."
    unet:object
    stored:dict # layer -> bits of its weight
    row:dict    # columns of the table

@lru_cache
def shipped(): return load_mini_ldm()

def twin():
    "A pipeline with a copy of the dense U-Net."
    pipe = copy.copy(shipped())
    pipe.unet = copy.deepcopy(pipe.unet)
    return pipe

def put(folder, made): write_atomic(folder/'made.pt', lambda path: torch.save((made.unet, made.stored, made.row), path))

def made_of(name):
    "What an earlier row made; ValueError where it has not been made."
    path = work/name/'made.pt'
    if not path.exists(): raise ValueError(f'{path} is not there: make the row {name!r} first')
    return Made(*torch.load(path, weights_only=False))  # our own file

def dense(folder): return Made(twin().unet, {}, {})

def encoded(folder, bits):
    with Spent(folder) as spent: unet, stored = our_unet(shipped(), bits, work_dir=folder/'layers')
    return Made(unet, stored, dict(encode_cpu_s=spent.seconds))

def peer(folder, name):
    with Spent(folder) as spent: unet, stored = PEERS[name].make(shipped())
    return Made(unet, stored, dict(encode_cpu_s=spent.seconds))

@lru_cache
def seen(): # what the library calibrates with
    return calibration_batches(shipped().unet, shipped(), 64, seed=0)

def with_act(unet, layers=None):
    inner = {n: m for n, m in (layers or packed_layers(unet)).items() if n not in ('conv_in', 'conv_out')}
    return attach_act(unet, 8, thinned(seen(), 24), layers=inner if layers else list(inner), seed=0)

def ours_eight(folder, base):
    before = made_of(base)
    with Spent(folder) as spent: unet = with_act(before.unet)
    return Made(unet, {n: 8*size for n, size in stored_sizes(unet).items()}, before.row | dict(encode_cpu_s=before.row['encode_cpu_s'] + spent.seconds))

# ---- training

@dataclass(frozen=True)
class Student:
    "Something that is trained: how to begin, and the settings beside the learning rate."
    begin:Callable # () -> (model, stored bits, columns so far)
    config:object

def ours_begin(base):
    before = made_of(base)
    return before.unet, before.stored, dict(before.row)

def straight_begin(act_bits=None):
    start = time.process_time()
    seen.cache_clear()                              # it pays for its own calibration, as ours did
    model = straight_through(twin().unet, 2, 64)
    layers = opened_layers(model)
    stored = {n: m.stored_bits for n, m in layers.items()}
    if act_bits: with_act(model, layers)
    seen()
    return model, stored, dict(encode_cpu_s=time.process_time() - start)

STUDENTS = {'ours 2 bit': Student(partial(ours_begin, 'ours 2 bit'), TUNED), 'ours 2 bit A8': Student(partial(ours_begin, 'ours 2 bit A8'), TUNED),
            'straight-through 2 bit': Student(straight_begin, PEER_TUNED), 'straight-through 2 bit A8': Student(partial(straight_begin, 8), PEER_TUNED)}

@lru_cache
def lesson():
    "Teacher, held-out walks and what errors are worth at each step: the same for all."
    unet = twin().unet.requires_grad_(False)
    return *(Teacher(shipped(), unet, n, seed=s) for n, s in ((16, 0), (1, 1))), timestep_weights(unet, split_points(seen())[1], .5)

def train(folder, model, config):
    "Train in place, by the clock of this process; the log's last row, which counts what earlier processes spent."
    lesson.cache_clear()                            # walks are made anew: each row pays for its own
    teacher, held, weights = lesson()
    folder.mkdir(parents=True, exist_ok=True)
    log = distill(model, teacher, config, held, folder/'training.pt', weights=weights, run=Run(progress=False), clock=time.process_time)
    return log[-1]

def trial(student, rate):
    "Held-out loss after a short run at this learning rate, and its seconds."
    path = work/'rates'/f'{student}, {rate:g}'/'found.json'
    if path.exists(): return json.loads(path.read_text())
    model, _, _ = STUDENTS[student].begin()
    end = train(path.parent, model, replace(STUDENTS[student].config, steps=SEARCH, lr=rate))
    found = dict(student=student, rate=rate, steps=SEARCH, loss=min(o for o in (end['held'], end['averaged']) if o == o), seconds=end['seconds'])
    write_atomic(path, json.dumps(found).encode())
    trials = [json.loads(o.read_text()) for o in (work/'rates').rglob('found.json')]
    table = pd.DataFrame(trials).sort_values(['student', 'rate']).to_csv(index=False, float_format='%.4g')
    write_atomic(tried, f"# make results: held-out loss after {SEARCH} steps at each learning rate; {stamp()}\n{table}".encode())
    return found

def rate_of(student):
    "(the best learning rate of the grid, seconds that finding it took)."
    found = [trial(student, rate) for rate in RATES]
    return min(found, key=lambda o: o['loss'])['rate'], sum(o['seconds'] for o in found)

def trained(folder, student, like=None, by=None):
    "A trained row: for MINUTES; or, like another row, for as many steps or as many seconds in all."
    (rate, search), (model, stored, row) = rate_of(student), STUDENTS[student].begin()
    config = replace(STUDENTS[student].config, steps=None, minutes=MINUTES, lr=rate)
    if like: 
        other = made_of(like).row
        left = other['encode_cpu_s'] + other['train_cpu_s'] - row['encode_cpu_s']
        config = replace(config, steps=other['steps'], minutes=None) if by == 'steps' else replace(config, minutes=left/60)
    end = train(folder, model, config)
    return Made(model.eval(), stored, row | dict(steps=end['step'], lr=rate, train_cpu_s=end['seconds'], search_cpu_s=search))

# ---- rows, in the order in which they are made

@dataclass(frozen=True)
class Row:
    "A row of the table."
    make:Callable     # make(folder) -> Made
    seconds:float     # that making it takes a processor as the one of the last run, images not counted
    shown:bool=False  # README shows it

_TRY, _IMAGE = len(RATES)*SEARCH*.8, .19            # seconds: of a search, of an image
_A8, _W = 'ours 2 bit A8, tuned', 'ours 2 bit, tuned'
ROWS = {'full precision': Row(dense, 0, True), 'ours 2 bit': Row(partial(encoded, bits=2.), 290, True),
        'uniform 2 bit, groups of 64, GPTQ': Row(partial(peer, name='uniform 2 bit, groups of 64, GPTQ'), 50, True),
        'ours 4 bit': Row(partial(encoded, bits=4.), 290, True), 'ours 2 bit A8': Row(partial(ours_eight, base='ours 2 bit'), 15),
        _A8: Row(partial(trained, student='ours 2 bit A8'), 60*MINUTES + _TRY, True),
        'straight-through 2 bit A8, equal seconds': Row(partial(trained, student='straight-through 2 bit A8', like=_A8, by='seconds'), 60*MINUTES + 300 + _TRY, True),
        'straight-through 2 bit A8, equal steps': Row(partial(trained, student='straight-through 2 bit A8', like=_A8, by='steps'), 60*MINUTES, True),
        'ours 1.5 bit': Row(partial(encoded, bits=1.5), 290, True),
        _W: Row(partial(trained, student='ours 2 bit'), 60*MINUTES + _TRY, True), 'ours 3 bit': Row(partial(encoded, bits=3.), 290, True),
        'straight-through 2 bit, equal seconds': Row(partial(trained, student='straight-through 2 bit', like=_W, by='seconds'), 60*MINUTES + 300 + _TRY),
        'straight-through 2 bit, equal steps': Row(partial(trained, student='straight-through 2 bit', like=_W, by='steps'), 60*MINUTES),
        'uniform 3 bit, groups of 64, GPTQ': Row(partial(peer, name='uniform 3 bit, groups of 64, GPTQ'), 50),
        'uniform 4 bit, groups of 64, GPTQ': Row(partial(peer, name='uniform 4 bit, groups of 64, GPTQ'), 50)}

def images_of(name, unet, n):
    "The first n images of a row, in parts that are kept."
    folder, pipe, parts = work/name/'images', copy.copy(shipped()), []
    folder.mkdir(parents=True, exist_ok=True)
    pipe.unet = unet
    for a in range(0, n, PART):
        path, count = folder/f'{a:05}.npy', min(PART, n - a)
        images = np.load(path) if path.exists() else np.zeros(0)
        if len(images) < count:
            images = sample_images(pipe, count, **SAMPLING, batch=PART, first=a).numpy()
            np.save(buffer := io.BytesIO(), images)
            write_atomic(path, buffer.getvalue())
        parts.append(torch.from_numpy(images[:count]))
    return torch.cat(parts)

def file_mb(unet):
    "MB of the folder that a packed U-Net is saved to; of another in half precision."
    if not packed_layers(unet): return sum(p.numel() for p in unet.parameters())*2e-6
    with TemporaryDirectory() as folder:
        attach(unet).save_pretrained(folder)        # it may have been trained since, or come from `made.pt`
        return sum(f.stat().st_size for f in Path(folder).rglob('*'))*1e-6

def measured(name, n):
    "The row of the table."
    folder = work/name
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder/'made.pt').exists():
        made = ROWS[name].make(folder)
        made.row |= dict(method=name, commit=commit(), date=time.strftime('%Y-%m-%d'))
        put(folder, made)
    made, pipe = made_of(name), shipped()
    truth = images_of('full precision', pipe.unet, n)
    images = truth if name == 'full precision' else images_of(name, made.unet, n)
    found = compare(images, truth, load_mini_classifier(), labels_of(pipe, n), errors=True)
    if name == 'full precision': found |= dict.fromkeys(('psnr_mean', 'psnr_se', 'psnr_mean_se'), math.nan)
    simulated = name.startswith(('straight', 'uniform'))
    size = {} if simulated else dict(file_mb=file_mb(made.unet))
    bits = count_bits(pipe.unet, made.stored)
    return made.row | found | size | dict(images=n, bits=bits['bits'], bits_all=bits['bits_all'])

# ---- every other result file, and what makes it

def slow(notebook, minutes, note=''): return f'nbdev_test --path nbs/{notebook}.ipynb --flags slow', minutes, note

_BENCH, _LAQ, _CPU, _TRAIN, _SD = '11_judging/39_bench', '05_bits/17_laq', '10_kernels/31_cpu', '02_models/08_train', '02_models/09_mini_sd'
MADE = { # file -> (command, processor minutes as its last run or an estimate says, remark); slow cells of one notebook run together
    'kaq_kernels.csv': slow('01_theory/02_kaq', 6), 'act_layers.csv': slow('04_layers/13_act', 4),
    'encoder_aqlm.csv': slow('03_encoder/11_encode', 25), 'encoder_damping.csv': slow('03_encoder/11_encode', 10), 'encoder_scaling.csv': slow('03_encoder/11_encode', 2),
    'laq_table.csv': slow(_LAQ, 6), 'laq_table.json': slow(_LAQ, 0, 'with laq_table.csv'), 'laq_additivity.csv': slow(_LAQ, 8), 'laq_savings.csv': slow(_LAQ, 10),
    'laq_paired.csv': slow(_LAQ, 60), 'laq_shared_kinds.csv': slow(_LAQ, 15), 'laq_front.csv': slow(_LAQ, 120),
    'quantize_cost.csv': slow('09_door/24_quant', 5), 'presets.csv': slow('09_door/24_quant', 20), 'row_gain.csv': slow('09_door/24_quant', 3),
    'hub_hardening.json': ('python tests/test_kill.py FOLDER 50, and the commands inside the file', 30, ''),
    'cpu_decode.csv': slow('10_kernels/26_decode', 1), 'cpu_layers.csv': slow(_CPU, 20), 'cpu_bench.json': slow(_CPU, 0, 'with cpu_layers.csv'), 'cpu_lut.csv': slow(_CPU, 2),
    'cpu_rule.csv': slow(_CPU, 15), 'cpu_rule.json': slow(_CPU, 0, 'with cpu_rule.csv'), 'cpu_unet.csv': slow(_CPU, 15, 'shown on the first page'),
    'ldm4_quantize.csv': slow('11_judging/38_ldm4', 140),
    'models.csv': ('aquatic bench --models --out nbs/results', 600, 'rows not run say so'), 'train_small.csv': slow('13_proof/42_small', 90),
    'cuda_build.csv': slow('10_kernels/33_cuda_runtime', 1), 'cuda_build.json': slow('10_kernels/33_cuda_runtime', 0, 'with cuda_build.csv'),
    'peers.csv': ('aquatic bench --peers --out nbs/results', 150, '-e .[bench] installed'),
    'quality.csv': ('aquatic bench --peers --n 2000, some rows at a time', 600, 'made on 2026-11-21 by the program of that day, its head completed by hand; tuned rows have the steps of their note; superseded by shipped.csv'),
    'off_track.csv': slow(_BENCH, 70), 'off_track_256.csv': slow(_BENCH, 50), 'calibrated_for.csv': slow(_BENCH, 30), 'semi_pv_codes.csv': slow(_BENCH, 20),
    'semi_pv_selectors.csv': slow(_BENCH, 12),
    'mini_eval.json': slow('11_judging/38_ldm4', 60), 'ldm4_encode.csv': slow('11_judging/38_ldm4', 34), 'ldm4_scaling.csv': slow('11_judging/38_ldm4', 17),
    'ldm4_layers.csv': ('', 0, 'before and after a change of the encoder: the code before it is in the history of git only'),
    'train_ae_kl.csv': slow(_TRAIN, 40), 'train_ae_vq.csv': slow(_TRAIN, 36), 'train_classifier.csv': slow(_TRAIN, 15), 'train_unet.csv': slow(_TRAIN, 106),
    'train_guidance.csv': slow(_TRAIN, 25), 'train_quality.csv': slow(_TRAIN, 10), 'train_classes.csv': slow(_TRAIN, 0, 'with train_quality.csv'),
    'train_mini.json': slow(_TRAIN, 0, 'with train_quality.csv'), 'train_mini_sd.csv': slow(_SD, 180), 'train_mini_sd_scores.csv': slow(_SD, 8)}

# ---- the file

def head(complete):
    return (f"# make results: the shipped model, {SAMPLING['steps']} steps, guidance {SAMPLING['guidance_scale']:g}, seed {SAMPLING['seed']}; trained rows: "
            f"{MINUTES} minutes of processor time, learning rates {', '.join(f'{o:g}' for o in RATES)} tried for {SEARCH} steps each (shipped_rates.csv); rows name "
            f"their commit; last written: {stamp()}; {'complete' if complete else 'unfinished'}\n")

def read(): return pd.read_csv(out, comment='#').to_dict('records') if out.exists() else []

def write(rows):
    place = {name: i for i, name in enumerate(ROWS)}
    rows = sorted(rows, key=lambda r: place.get(r['method'], len(place)))
    complete = {r['method'] for r in rows} >= ROWS.keys()
    text = pd.DataFrame(rows).reindex(columns=COLUMNS).to_csv(index=False, float_format='%.5g')
    write_atomic(out, (head(complete) + text).encode())

def is_done(name, rows, n): return any(r['method'] == name and r['images'] >= n for r in rows)

def remake(names, n):
    for name in names:
        rows = read()
        if is_done(name, rows, n): continue
        print(f'--- {name}', flush=True)
        start = time.process_time()
        row = measured(name, n)
        write([r for r in read() if r['method'] != name] + [row])
        print(f"    {time.process_time() - start:.0f} CPU s: {row['bits']:.2f} bits, {row['psnr']:.1f} dB pooled, {row['psnr_mean']:.1f} in the mean, "
              f"accuracy {row['accuracy']:.3f}", flush=True)
        gc.collect()

def plan(names, n):
    "What is left of each row, in words and seconds."
    rows, total = read(), 0.
    for name in names:
        o, there = ROWS[name], work/name
        drawn = len(list((there/'images').glob('*.npy')))*PART
        left = 0. if is_done(name, rows, n) else (0 if (there/'made.pt').exists() else o.seconds) + _IMAGE*max(0, n - drawn)
        total += left
        print(f"{name:42} {'done' if not left else f'{left:6.0f} CPU s'}")
    print('\n'.join(f"{name:42} {command or 'cannot be made again'}, about {minutes} CPU minutes{'; ' + note if note else ''}" for name, (command, minutes, note) in MADE.items()))
    print(f'{len(names)} rows of {n} images into nbs/results/{out.name}: {total/3600:.1f} hours of one core are left (estimated)')

def main(args=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('rows', nargs='*', metavar='row', help='some of those that --plan names (all)')
    p.add_argument('--plan', action='store_true', help='say what is left to do and what it costs, and do nothing')
    p.add_argument('--n', type=int, default=IMAGES, help=f'images of a row ({IMAGES}); more may be drawn later, the first ones stay')
    args = p.parse_args(args)
    if unknown := sorted(set(args.rows) - ROWS.keys()): p.error(f"no row named {unknown[0]!r}; --plan names them")
    if args.n < 2: p.error(f'--n is {args.n}, expected at least 2')
    names = args.rows or list(ROWS)
    if args.plan: return plan(names, args.n)
    torch.set_num_threads(1)
    remake(names, args.n)

if __name__ == '__main__': main()
