"""`kill -9` at random moments of `aquatic quantize`, and of tuning: the next run ends with the same bytes, and a half-written result is never seen.

`python tests/test_kill.py FOLDER KILLS` does the same with a log, FOLDER/kills.jsonl; with a third argument, `tuning`, it is tuning that is killed.
"""
import os
os.environ.setdefault('OMP_NUM_THREADS', '1')
import aquatic_nb # noqa: F401 first: torchvision may lack its operators
import hashlib, json, multiprocessing, random, shutil, sys, time
from pathlib import Path

import pytest

from packed_models import class_pipe, ddpm, plain

ARGS = ['--bits', '5', '--no-calibration'] # quick; calibration changes what a layer's codes are, not how they are kept

def quantize(folder, dst):
    "The console script."
    from aquatic_nb.cli import main
    main(['quantize', str(folder/'src'), str(dst), *ARGS])

def prepare_quantize(folder, how):
    ddpm(plain()).save_pretrained(folder/'src')
    if how == 'fork':
        for name in ('quant', 'hub', 'cli'): __import__(f'aquatic_nb.{name}')

def files_in(work): return dict(files_in_work_dir=len(list(work.rglob('*.*'))))

# tuning: every result is begun with the layers encoded, so that it is tuning which is killed; a checkpoint every 50 ms, not every five minutes

class Halt(Exception): "Tuning would begin now."

def tuned(work):
    from aquatic_nb.quant import quantize_unet
    from aquatic_nb.tune.distill import TuneConfig
    pipe = class_pipe()
    how = TuneConfig(steps=30, batch=4, mode='walk', selector='A', code_lr=.3, code_every=2, code_fraction=.05, trust_ratio=.5, warmup=2, held_every=10, seed=5)
    return quantize_unet(pipe.unet, 7, calibration=pipe, tune=how, work_dir=work, laq=False, overrides={'*resnets*': (2, 3), '*attn*': (1, 4)}, sweeps=1, beam=2, n_calibration=2, workers=1, progress=False)

def tune(folder, dst):
    from aquatic_nb import hub
    from aquatic_nb.tune import distill as room
    if not (work := dst.with_name(dst.name + '.work')).exists():
        shutil.copytree(folder/'encoded', tmp := dst.with_name(f'{dst.name}.{os.getpid()}')); os.replace(tmp, work)
    def distill(*args, real=room.distill, **kwargs):
        log = real(*args, **kwargs, every_minutes=.05/60)
        assert log[-1]['kept'] != 'start' and any(r[k] for r in log[:-1] for k in ('additive', 'integer')), log[-1] # there is something that could differ
        return log
    room.distill = distill
    hub.save_quantized(tuned(work), dst)

def prepare_tune(folder, how):
    from aquatic_nb.tune import distill as room
    def halt(student, teacher, config, held, *args, **kwargs): # where processes are forks of this one, they inherit the teacher's walks
        if how == 'fork': held.walk(0), [room.walk_batch(teacher, i, config.batch, config.seed) for i in range(0, config.steps, teacher.steps)]
        raise Halt
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, 'distill', halt)
        with pytest.raises(Halt): tuned(folder/'encoded')

def remember(patch, owner, name, key=lambda *args: 0):
    "Compute each answer of a function once; forks inherit the answers."
    real, known = getattr(owner, name), {}
    def call(*args, **kwargs):
        if (k := key(*args)) not in known: known[k] = real(*args, **kwargs)
        return known[k]
    patch.setattr(owner, name, call)

def remember_all(patch):
    from aquatic_nb import quant
    from aquatic_nb.tune.distill import Teacher
    remember(patch, quant, 'calibration_batches'); remember(patch, quant, 'timestep_weights')
    remember(patch, Teacher, 'make', lambda teacher, i: (teacher.seed, i))

def step_in(work):
    import torch
    path = work/'tuning.pt'
    return dict(step=torch.load(path, weights_only=True)['step'] if path.exists() else None, unfinished_checkpoint=bool(list(work.glob('.tuning.pt*'))))

JOBS = dict(quantize=(prepare_quantize, quantize, files_in), tuning=(prepare_tune, tune, step_in))

# killing

def work(job, folder, dst):
    "What a process does, its output in a file."
    import torch
    torch.set_num_threads(1)
    file = os.open(folder/'out.txt', os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1); os.dup2(file, 2)
    JOBS[job][1](folder, dst)

def start(job, folder, dst, how):
    "A process that works; `fork` skips the seconds that imports take, so that more kills hit the work itself."
    process = multiprocessing.get_context(how).Process(target=work, args=(job, folder, dst))
    process.start()
    return process

def digests(folder): return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.rglob('*')) if f.suffix in ('.safetensors', '.json')}

def whole_run(job, folder, how):
    "An unbroken run: its digests and its seconds."
    folder.mkdir(exist_ok=True, parents=True)
    JOBS[job][0](folder, how)
    begin = time.perf_counter()
    run = start(job, folder, folder/'whole', how)
    run.join()
    assert run.exitcode == 0, (folder/'out.txt').read_text()[-2000:]
    return digests(folder/'whole'), time.perf_counter() - begin

def kill_until_done(job, folder, kills, seconds, seed, how, log=None):
    "Start, kill after a random time, start again, up to five times for one result. Yields the digests of every finished result."
    r, killed, n = random.Random(seed), 0, 0
    while killed < kills:
        dst, here = folder/f'dst{n}', 0
        n += 1
        while True:
            run = start(job, folder, dst, how)
            run.join(None if killed >= kills or here >= 5 else r.uniform(.02, 1.05)*seconds)
            if run.is_alive():
                run.kill(); run.join()
                killed, here = killed + 1, here + 1
                if log is not None:
                    kept = JOBS[job][2](dst.with_name(dst.name + '.work'))
                    with open(log, 'a') as f: f.write(json.dumps(dict(kill=killed, result=n, **kept, saving=dst.with_name(f'.{dst.name}.saving').exists(), dst_exists=dst.exists())) + '\n')
                if dst.exists(): break # killed after the rename
                continue
            assert run.exitcode == 0, (folder/'out.txt').read_text()[-2000:]
            break
        yield digests(dst)
        assert not dst.with_name(f'.{dst.name}.saving').exists() or killed
        shutil.rmtree(dst); shutil.rmtree(dst.with_name(dst.name + '.work'), ignore_errors=True)

@pytest.mark.parametrize('job', ['quantize', pytest.param('tuning', marks=pytest.mark.slow)]) # a killed tuning: also in test_distill and test_distributed
def test_two_kills(tmp_path, job):
    want, seconds = whole_run(job, tmp_path, 'spawn')
    assert all(o == want for o in kill_until_done(job, tmp_path, 2, seconds, 0, 'spawn'))

@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize('job', JOBS)
def test_fifty_kills(tmp_path, monkeypatch, job):
    if job == 'tuning': remember_all(monkeypatch)
    want, seconds = whole_run(job, tmp_path, 'fork')
    finished = list(kill_until_done(job, tmp_path, 50, seconds, 1, 'fork'))
    assert len(finished) >= 10 and all(o == want for o in finished)

def main(folder, kills, job='quantize'):
    folder, finished = Path(folder), []
    with pytest.MonkeyPatch.context() as patch:
        if job == 'tuning': remember_all(patch)
        want, seconds = whole_run(job, folder, 'fork')
        for found in kill_until_done(job, folder, int(kills), seconds, 1, 'fork', folder/'kills.jsonl'):
            finished.append(found)
            print('the same bytes' if found == want else 'OTHER BYTES', flush=True)
    print(f'{kills} kills of {job}, {len(finished)} finished runs, {sum(o == want for o in finished)} with the same bytes; an unbroken run takes {seconds:.1f} s')

if __name__ == '__main__': main(*sys.argv[1:])
