"""`kill -9` at random moments of `aquatic quantize`: the next run ends with the same bytes, and a half-written result is never seen.

`python tests/test_kill.py FOLDER KILLS` does the same with a log, FOLDER/kills.jsonl.
"""
import os
os.environ.setdefault('OMP_NUM_THREADS', '1')
import aquatic_nb # noqa: F401 first: torchvision may lack its operators
import hashlib, json, multiprocessing, random, shutil, sys, time
from pathlib import Path

import pytest

from packed_models import ddpm, plain

ARGS = ['--bits', '5', '--no-calibration'] # quick; calibration changes what a layer's codes are, not how they are kept

def quantize(src, dst, log):
    "What a process does: the console script, its output in a file."
    import torch
    from aquatic_nb.cli import main
    torch.set_num_threads(1)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1); os.dup2(file, 2)
    main(['quantize', str(src), str(dst), *ARGS])

def start(folder, dst, how):
    "A process that quantizes; `fork` skips the seconds that imports take, so that more kills hit the work itself."
    process = multiprocessing.get_context(how).Process(target=quantize, args=(folder/'src', dst, folder/'out.txt'))
    process.start()
    return process

def digests(folder): return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.rglob('*')) if f.suffix in ('.safetensors', '.json')}

def whole_run(folder, how):
    "An unbroken run: its digests and its seconds."
    folder.mkdir(exist_ok=True, parents=True)
    ddpm(plain()).save_pretrained(folder/'src')
    if how == 'fork':
        for name in ('quant', 'hub', 'cli'): __import__(f'aquatic_nb.{name}')
    begin = time.perf_counter()
    run = start(folder, folder/'whole', how)
    run.join()
    assert run.exitcode == 0, (folder/'out.txt').read_text()[-2000:]
    return digests(folder/'whole'), time.perf_counter() - begin

def kill_until_done(folder, kills, seconds, seed, how, log=None):
    "Start, kill after a random time, start again, up to five times for one result. Yields the digests of every finished result."
    r, killed, n = random.Random(seed), 0, 0
    while killed < kills:
        dst, here = folder/f'dst{n}', 0
        n += 1
        while True:
            run = start(folder, dst, how)
            run.join(None if killed >= kills or here >= 5 else r.uniform(.02, 1.05)*seconds)
            if run.is_alive():
                run.kill(); run.join()
                killed, here = killed + 1, here + 1
                if log is not None:
                    kept = len(list(dst.with_name(dst.name + '.work').rglob('*.*')))
                    with open(log, 'a') as f: f.write(json.dumps(dict(kill=killed, files_in_work_dir=kept, saving=dst.with_name(f'.{dst.name}.saving').exists(), dst_exists=dst.exists())) + '\n')
                if dst.exists(): break # killed after the rename
                continue
            assert run.exitcode == 0, (folder/'out.txt').read_text()[-2000:]
            break
        yield digests(dst)
        assert not dst.with_name(f'.{dst.name}.saving').exists() or killed
        shutil.rmtree(dst); shutil.rmtree(dst.with_name(dst.name + '.work'), ignore_errors=True)

def test_two_kills(tmp_path):
    want, seconds = whole_run(tmp_path, 'spawn')
    assert all(o == want for o in kill_until_done(tmp_path, 2, seconds, 0, 'spawn'))

@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_fifty_kills(tmp_path):
    want, seconds = whole_run(tmp_path, 'fork')
    finished = list(kill_until_done(tmp_path, 50, seconds, 1, 'fork'))
    assert len(finished) >= 10 and all(o == want for o in finished)

if __name__ == '__main__':
    folder, kills = Path(sys.argv[1]), int(sys.argv[2])
    want, seconds = whole_run(folder, 'fork')
    finished = []
    for found in kill_until_done(folder, kills, seconds, 1, 'fork', folder/'kills.jsonl'):
        finished.append(found)
        print('the same bytes' if found == want else 'OTHER BYTES', flush=True)
    print(f'{kills} kills, {len(finished)} finished runs, {sum(o == want for o in finished)} with the same bytes; an unbroken run takes {seconds:.1f} s')
