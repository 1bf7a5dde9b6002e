"""`kill -9` at random moments of `aquatic quantize`: the next run ends with the same bytes, and a half-written result is never seen."""
import aquatic_nb # noqa: F401  first: torchvision may lack its operators
import hashlib, json, random, shutil, signal, subprocess, sys, time
from pathlib import Path

import pytest

from packed_models import ddpm, plain

ARGS = ['--bits', '5', '--no-calibration'] # quick: the calibrated path differs in what a layer's codes are, not in how they are kept

def command(src, dst): return [sys.executable, '-c', 'from aquatic_nb.cli import main; main()', 'quantize', str(src), str(dst), *ARGS]
def digests(folder): return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.rglob('*')) if f.suffix in ('.safetensors', '.json')}

def whole_run(folder):
    "An unbroken run: its digests and its seconds."
    ddpm(plain()).save_pretrained(folder/'src')
    start = time.perf_counter()
    subprocess.run(command(folder/'src', folder/'whole'), check=True, capture_output=True)
    return digests(folder/'whole'), time.perf_counter() - start

def kill_until_done(folder, kills, seconds, seed, log=None):
    "Start, kill after a random time, start again ...; after `kills` kills let it finish. Returns the digests of every finished result."
    r, killed, finished, n = random.Random(seed), 0, [], 0
    while killed < kills:
        dst, killed_here = folder/f'dst{n}', 0
        n += 1
        while True:
            run = subprocess.Popen(command(folder/'src', dst), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            last = killed >= kills or killed_here >= 5
            try: out, err = run.communicate(timeout=None if last else r.uniform(.35, 1.05)*seconds)
            except subprocess.TimeoutExpired:
                run.send_signal(signal.SIGKILL); run.communicate()
                killed, killed_here = killed + 1, killed_here + 1
                layers = len(list(dst.with_name(dst.name + '.work').glob('*')))
                if log is not None:
                    with open(log, 'a') as f: f.write(json.dumps(dict(kill=killed, files_in_work_dir=layers, dst_exists=dst.exists())) + '\n')
                if dst.exists(): break # killed between the rename and the end
                continue
            assert run.returncode == 0, err[-2000:]
            break
        finished.append(digests(dst))
        shutil.rmtree(dst)
    return finished

def test_two_kills(tmp_path):
    want, seconds = whole_run(tmp_path)
    assert all(o == want for o in kill_until_done(tmp_path, 2, seconds, 0))
    assert sorted(o.name for o in tmp_path.iterdir() if o.name.startswith('.')) == []

@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_fifty_kills(tmp_path):
    want, seconds = whole_run(tmp_path)
    finished = kill_until_done(tmp_path, 50, seconds, 1)
    assert len(finished) >= 10 and all(o == want for o in finished)

if __name__ == '__main__': # python tests/test_kill.py FOLDER KILLS: the same with a log
    folder, kills = Path(sys.argv[1]), int(sys.argv[2])
    folder.mkdir(parents=True)
    want, seconds = whole_run(folder)
    finished = kill_until_done(folder, kills, seconds, 1, folder/'kills.jsonl')
    print(f'{kills} kills, {len(finished)} finished runs, {sum(o == want for o in finished)} with the same bytes; an unbroken run takes {seconds:.1f} s')
