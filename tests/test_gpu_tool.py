"""`make gpu` without a GPU: its list, its refusal, how it goes on, and its pieces rehearsed on a pretended device with a tiny U-Net."""
import importlib.util
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from cuda_emulator import Emulator, can_emulate, emulated
from device_check import pretend

from aquatic_nb import cuda, layers
from aquatic_nb.kernels.cuda_source import SOURCES

root = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location('gpu', root/'tools'/'gpu.py')
tool = sys.modules['gpu'] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)
needs_gxx = pytest.mark.skipif(not can_emulate, reason='the emulator needs Linux and g++')
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')


def stamp(name, complete): return f"# made by a test, piece {name}; {'complete' if complete else 'unfinished'}"


def test_it_lists_its_pieces(capsys):
    assert tool.main(['--list']) == tool.DONE
    said = capsys.readouterr().out.splitlines()
    assert len(said) == len(tool.PIECES) == len({line.split()[0] for line in said}) and all(len(line.split()) > 3 for line in said)
    for part in ('tests', 'kernels', 'sanitizer', 'layers', 'choices', 'unet', 'encode', 'tuned'): assert any(line.startswith(part) for line in said)


@no_gpu
def test_without_a_gpu_it_says_so_in_one_sentence_and_succeeds(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, 'out', tmp_path)
    for args in ([], ['kernels-3'], ['--once'], ['--work', 'tests']):
        assert tool.main(args) == tool.DONE
        assert capsys.readouterr().out == 'There is no CUDA device here, so nothing was measured.\n'
    assert not list(tmp_path.iterdir())


def test_an_old_card_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda: (7, 5))
    assert tool.why_not() == 'Nothing was measured: compute capability 7.5, the kernels need 8.0.'


def test_unknown_pieces_are_refused(capsys):
    with pytest.raises(SystemExit) as e: tool.main(['kernels-99'])
    assert e.value.code == 2 and "no piece named kernels-99" in capsys.readouterr().err


def test_make_gpu_is_this_program():
    said = subprocess.run(['make', '-n', 'gpu'], cwd=root, capture_output=True, text=True)
    assert said.returncode == 0 and 'tools/gpu.py' in said.stdout


# ---------------------------------------------------------------- going on

def test_a_stopped_piece_goes_on_after_its_last_row(tmp_path, monkeypatch):
    made, broken = [], [True]
    def case(i):
        if i == 1 and broken: raise RuntimeError('stopped')
        made.append(i)
        return [dict(value=i, half=h) for h in (0, 1)]
    monkeypatch.setitem(tool.PIECES, 'toy', tool.Piece('a toy', lambda: ((f'case {i}, "quoted"', lambda i=i: case(i)) for i in range(3))))
    path = tmp_path/'toy.csv'
    with pytest.raises(RuntimeError, match='stopped'): tool.go_on('toy', path, 60, stamp)
    assert made == [0] and not tool.is_complete(path) and len(tool.read(path)) == 2
    broken.clear()
    assert tool.go_on('toy', path, 60, stamp) and tool.is_complete(path) and made == [0, 1, 2]
    table = pd.read_csv(path, comment='#')
    assert list(table.value) == [0, 0, 1, 1, 2, 2] and path.read_text().startswith('# made by a test, piece toy; complete\n')


def test_a_file_says_what_made_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda *args: 'NVIDIA H100 80GB HBM3')
    monkeypatch.setattr(tool, 'said_by', lambda *cmd: '550.54.15\n550.54.15' if cmd[0] == 'nvidia-smi' else 'abc1234' if 'rev-parse' in cmd else '')
    line = tool.head('unet-ldm4', True)
    assert line.startswith('# make gpu, piece unet-ldm4; NVIDIA H100 80GB HBM3, driver 550.54.15, CUDA ') and line.endswith('; complete')
    assert f"; commit abc1234; {time.strftime('%Y-%m-%d')}; " in line and '\n' not in line and tool.head('x', False).endswith('; unfinished')


def test_a_piece_stops_when_its_time_is_over(tmp_path, monkeypatch):
    monkeypatch.setitem(tool.PIECES, 'toy', tool.Piece('a toy', lambda: [('one', lambda: [dict(a=1)])]))
    path = tmp_path/'toy.csv'
    assert not tool.go_on('toy', path, -1, stamp) and not tool.is_complete(path) and tool.read(path) == []
    assert tool.go_on('toy', path, 60, stamp) and tool.is_complete(path)


def test_a_process_is_stopped_with_what_it_started(tmp_path):
    note = tmp_path/'alive'
    child = f"import time\nwhile True: open({str(note)!r}, 'w').write(str(time.time())); time.sleep(.05)"
    start, code = time.monotonic(), f'import subprocess, sys; subprocess.run([sys.executable, "-c", {child!r}])'
    assert tool.process('toy', [sys.executable, '-c', code], minutes=3/60) == tool.LEFT and time.monotonic() - start < 30
    time.sleep(.5); last = note.read_text() if note.exists() else ''
    time.sleep(.5); assert (note.read_text() if note.exists() else '') == last
    assert tool.process('toy', [sys.executable, '-c', 'raise SystemExit(1)']) == tool.FAILED


def test_time_that_was_spent_adds_up_over_processes(tmp_path):
    with tool.Spent(tmp_path) as first: time.sleep(.05)
    with tool.Spent(tmp_path) as second: pass
    assert first.now()['processes'] == 1 and second.now()['processes'] == 2 and second.before['seconds'] >= .05


# ---------------------------------------------------------------- the pieces, rehearsed

@needs_gxx
@pytest.mark.parametrize('i', range(0, 10000, 2100))
def test_random_cases_as_a_gpu_gets_them(i): assert tool.check_cases([i], Emulator(i//2100 % 3), 'cpu')[0]['runs'] > 0


@needs_gxx
def test_a_wrong_kernel_is_named_with_its_case(monkeypatch):
    monkeypatch.setitem(SOURCES, 'aq_decode', SOURCES['aq_decode'].replace('f[i] *= s', 'f[i] *= s*1.05f'))
    emulated.cache_clear()
    try:
        with pytest.raises(AssertionError, match=r'case 3, scratch, \w+.*off by 0.0'): tool.check_cases([3], Emulator(), 'cpu')
    finally: emulated.cache_clear()


@pytest.fixture
def rehearsal(monkeypatch, tmp_path):
    "A pretended H200, seconds that are made up, and a U-Net of a few thousand weights in place of LDM-4."
    if not can_emulate: pytest.skip('the emulator needs Linux and g++')
    backend = Emulator()
    def pretended_seconds(calls, **options):
        for f in calls: f()
        return 1e-3
    monkeypatch.setattr(layers, 'why_not_plain', lambda layer, x: None)
    for module in (cuda, tool):
        monkeypatch.setattr(module, 'gpu', lambda index: backend)
        monkeypatch.setattr(module, 'cuda_seconds', pretended_seconds)
    monkeypatch.setattr(cuda, '_capability', lambda index: (9, 0))
    for name in ('empty_cache', 'reset_peak_memory_stats'): monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, 'max_memory_allocated', lambda: 10**6)
    for name in ('out', 'work'): monkeypatch.setattr(tool, name, tmp_path)
    config = dict(sample_size=8, in_channels=3, out_channels=3, down_block_types=('CrossAttnDownBlock2D',), up_block_types=('UpBlock2D',), mid_block_type=None,
                  block_out_channels=(16,), layers_per_block=1, cross_attention_dim=16, attention_head_dim=1, norm_num_groups=8)
    monkeypatch.setitem(tool.CONFIGS, 'LDM-4', dict(cls='UNet2DConditionModel', tokens=1, parameters=0, config=config))
    tool.unet_of.cache_clear()
    with pretend() as device: yield device
    tool.unet_of.cache_clear()


def test_layers_are_measured_and_the_dispatch_reads_it(rehearsal, tmp_path, monkeypatch):
    cases = list(tool.layers('LDM-4', 1))
    assert len(cases) > 10 and len({case for case, _ in cases}) == len(cases)
    monkeypatch.setitem(tool.PIECES, 'layers-toy', tool.Piece('a toy', lambda: [next(c for c in cases if kind in c[0]) for kind in ('linear', 'conv3x3')]))
    for name in ('layers-toy', 'choices'): assert tool.go_on(name, tmp_path/f'gpu_h200_{name}.csv', 600, stamp)
    rows = tool.read(tmp_path/'gpu_h200_layers-toy.csv')
    assert {r['kind'] for r in rows} == {'linear', 'conv3x3'} and all(r['microseconds'] == 1000 and abs(r['ratio'] - 1) < 1e-9 for r in rows)
    table = cuda.read_table(str(tmp_path/'gpu_h200_choices.csv'))
    assert table and all(key[0] == 'H200' for key in table)


@pytest.mark.parametrize('way', ['fp16', 'W2A8'])
def test_unets_are_measured(way, rehearsal):
    row, = tool.unet_rows('LDM-4', way, 1)
    assert row['ms'] == 1 and row['images_per_s_of_20_steps'] == 50 and row['weights_MB'] > 0 and row['peak_MB'] == 1


def test_unets_that_do_not_fit_are_rows_too(rehearsal, monkeypatch):
    def full(*args, **kwargs): raise torch.cuda.OutOfMemoryError('full')
    monkeypatch.setattr(tool, 'cuda_seconds', full)
    assert tool.unet_rows('LDM-4', 'fp16', 64) == [dict(model='LDM-4', way='fp16', images=64, note='out of memory')]


def test_encoding_is_measured(rehearsal, monkeypatch):
    seen = []
    def pretended(model, **options): seen.append((model, options)); return model
    monkeypatch.setattr(tool, 'quantize_unet', pretended)
    rows = [make()[0] for _, make in tool.encodings('LDM-4')]
    assert [r['case'] for r in rows] == list(tool.ENCODED) and all(r['minutes'] >= 0 and r['processes'] == 1 for r in rows)
    assert all(next(m.parameters()).is_cuda for m, _ in seen) and len({str(o['work_dir']) for _, o in seen}) == 3
    weights = [next(m.parameters()).cpu() for m, _ in seen]
    assert torch.equal(weights[0], weights[1])                  # a process that goes on has the same model


def test_tuning_is_judged(rehearsal, monkeypatch, tmp_path):
    asked = []
    def sampled(pipe, n, **options):
        asked.append(pipe.unet.device if n == 2 else n)
        return torch.full((n, 1, 32, 32), .5 + .1*(len(asked) > 1))
    monkeypatch.setattr(tool, 'quantize_unet', lambda model, bits, **options: asked.append((bits, options)))
    monkeypatch.setattr(tool, 'sample_images', sampled)
    monkeypatch.setattr('diffusers.UNet2DConditionModel.save_pretrained', lambda model, folder: Path(folder).mkdir())
    for _ in range(2):
        row, = tool.tuned_rows(1.5, 8, 2)
        assert abs(row['psnr'] - 20) < 1e-3 and row['act_bits'] == 8 and row['images'] == 2 and 'steps=20000' in row['recipe']
        (tmp_path/'tuned 1.5 8'/'model').rmdir()
    assert row['processes'] == 2 and len(asked) == 5                        # the images of full precision are kept
    assert asked[1][0] == 1.5 and asked[1][1]['act_bits'] == 8 and asked[1][1]['tune'] is tool.FULL
