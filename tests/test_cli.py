"""The command line as a person or a script meets it: results on stdout, messages on stderr, exit codes, nothing overwritten."""
import aquatic_nb # first: torchvision may lack its operators
import json, os, re, signal, subprocess, sys, time
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel

from aquatic_nb import cli
from aquatic_nb.core import work_lock
from aquatic_nb.hub import load_quantized
from aquatic_nb.layers import packed_layers
from aquatic_nb.pack import WorkDir
from aquatic_nb.walk import SAMPLING_GUIDANCE
from packed_models import class_pipe, conditional, ddpm, plain

def aquatic(capsys, *args):
    "Run a command in this process."
    capsys.readouterr()
    with pytest.raises(SystemExit) as e: cli.main([str(a) for a in args])
    out, err = capsys.readouterr()
    return e.value.code or 0, out, err

QUICK = ['--no-calibration', '--bits', '6']

@pytest.fixture(scope='module')
def pipe_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('cli')/'dense pipe é'
    ddpm(plain()).save_pretrained(folder)
    return folder

@pytest.fixture(scope='module')
def packed(pipe_folder):
    with pytest.raises(SystemExit) as e: cli.main(['quantize', str(pipe_folder), str(pipe_folder.parent/'small'), *QUICK])
    assert not e.value.code
    return pipe_folder.parent/'small'

def test_quantize_a_pipeline(packed, capsys):
    assert (packed/'model_index.json').exists() and not packed.with_name('small.work').exists()
    code, out, err = aquatic(capsys, 'info', packed, '--json')
    found = json.loads(out)
    assert code == 0 and found['packed_layers'] > 20 and found['bits'] <= 6 and len(found['layers']) == found['packed_layers'] + found['dense_layers']
    assert sum(found['runs'].values()) == found['packed_layers'] and found['weight_cache']['budget'] > 0
    assert found['file_bytes'] == sum(f.stat().st_size for f in (packed/'unet').glob('*.safetensors'))
    code, out, err = aquatic(capsys, 'info', packed, '--layers')
    assert code == 0 and 'mid_block' in out and 'kernels' in out

def test_info_about_this_machine(capsys):
    code, out, err = aquatic(capsys, 'info', '--json')
    found = json.loads(out)
    assert code == 0 and {'decode', 'dense'} <= set(found['kernels']) and found['width'] in found['widths'] and found['why'], err
    assert found['bfloat16'] in (True, False) and found['weight_cache'].keys() >= {'used', 'budget'}

def test_quantize_a_model_folder(tmp_path, capsys):
    conditional().save_pretrained(tmp_path/'dense')
    code, out, err = aquatic(capsys, 'quantize', tmp_path/'dense', tmp_path/'small', '--json', *QUICK)
    assert code == 0, err
    assert json.loads(out)['bits'] <= 6 and 'GB of memory' in err
    code, out, err = aquatic(capsys, 'quantize', tmp_path/'small', tmp_path/'again', *QUICK)
    assert code == 2 and 'already quantized' in err

def test_activations(tmp_path, capsys):
    from aquatic_nb.act import act_layers
    conditional().save_pretrained(tmp_path/'dense')
    code, out, err = aquatic(capsys, 'quantize', tmp_path/'dense', tmp_path/'small', '--bits', '6', '--act-bits', '8', '--trajectories', '2', '--uniform')
    assert code == 0, err
    assert act_layers(load_quantized(tmp_path/'small')) and json.loads((tmp_path/'small'/'config.json').read_text())['quantization_config']['act_bits'] == 8

def test_plan_reads_no_weights(pipe_folder, tmp_path, capsys):
    import shutil
    shutil.copytree(pipe_folder, tmp_path/'p')
    for f in (tmp_path/'p').rglob('*.safetensors'): f.unlink()
    code, out, err = aquatic(capsys, 'quantize', tmp_path/'p', '--plan', '--bits', '6', '--json')
    assert code == 0, err
    assert json.loads(out)['layers'] and sorted(o.name for o in tmp_path.iterdir()) == ['p']

def test_plan_says_what_the_run_would_do(pipe_folder, capsys):
    def plan(*args):
        code, out, err = aquatic(capsys, 'quantize', pipe_folder, '--plan', '--bits', '6', '--json', *args)
        assert code == 0, err
        found = json.loads(out)
        return found['stages'], {o['layer']: o['scheme'] for o in found['layers']}, found
    stages, schemes, found = plan('--act-bits', 8, '--tune', 3, '--override', 'conv_in=dense')
    assert list(stages) == ['walk', 'sensitivity', 'encode', 'activations', 'tune', 'save'] and stages['walk'].startswith('64 traj') and '3 min' in stages['tune']
    assert schemes['conv_in'] == 'dense' and set(schemes.values()) == {'dense', 'LAQ decides'} and found['layers'][3]['bytes'] is None
    assert found['memory']['total'] == sum(v for k, v in found['memory'].items() if k != 'total')
    stages, schemes, _ = plan('--uniform', '--trajectories', 5)
    assert list(stages) == ['walk', 'encode', 'save'] and stages['walk'].startswith('5 traj') and 'LAQ decides' not in schemes.values()
    stages, schemes, found = plan('--no-calibration')
    assert list(stages) == ['encode', 'save'] and 'LAQ decides' not in schemes.values() and found['memory']['moments'] == 0

def test_plan_counts_trajectories_as_the_run_does(pipe_folder, tmp_path, capsys, monkeypatch):
    from aquatic_nb import quant
    asked = []
    monkeypatch.setattr(quant, 'calibration_batches', lambda model, data, n, **kw: asked.append(n) or 1/0)
    code, out, err = aquatic(capsys, 'quantize', pipe_folder, tmp_path/'dst', '--bits', 6)
    assert code == 1 and f'walk: {asked[0]} trajectories' in err

@pytest.mark.parametrize('args, says', [
    (['quantize', 'nowhere', 'DST'], 'does not exist'), (['quantize', 'SRC', 'SRC'], '--force'), (['quantize', 'SRC'], 'DST'), (['quantize', 'EMPTY', 'DST'], 'no diffusers model'),
    (['quantize', 'SRC', 'DST', '--bits', '0'], 'bits'), (['quantize', 'SRC', 'DST', '--bits', '17'], '0.25 to 16'), (['quantize', 'SRC', 'DST', '--bits', 'nan'], 'bits'), (['quantize', 'SRC', 'DST', '--bits', 'two'], '--bits'),
    (['quantize', 'SRC', 'DST', '--act-bits', '1'], 'act-bits'), (['quantize', 'SRC', 'DST', '--act-bits', '5'], 'act-bits'),
    (['quantize', 'SRC', 'DST', '--tune', '0'], '--tune'), (['quantize', 'SRC', 'DST', '--tune', 'inf'], '--tune'), (['quantize', 'SRC', 'DST', '--memory', 'nan'], '--memory'), (['quantize', 'SRC', 'DST', '--trajectories', '0'], '--trajectories'),
    (['quantize', 'SRC', 'SRC', '--force'], 'is SRC'), (['quantize', 'SRC', 'SRC/..', '--force'], 'holds it'), (['quantize', 'SRC', 'FOREIGN', '--force'], 'no model folder'), (['quantize', 'SRC', 'DST', '--part', 'vae'], 'vae'), (['quantize', 'SRC/model_index.json', 'DST'], 'is a file'),
    (['quantize', 'SRC/unet', 'DST', '--bits', '6', '--tune', '1'], 'pipeline'), (['quantize', 'SRC', 'DST', '--no-calibration', '--act-bits', '8'], '--no-calibration'),
    (['sample', 'nowhere'], 'does not exist'), (['sample', 'SRC/unet'], 'not a pipeline'), (['sample', 'SRC', '--n', '0'], '--n'), (['sample', 'SRC', '--classes', 'a'], 'numbers'), (['sample', 'SRC', '--out', 'SRC'], 'not empty'),
    (['evaluate', 'SRC', '--n', '2', '--steps', '1'], '--against'), (['info', 'EMPTY'], 'config.json'), (['bench', 'SRC'], 'not packed'), (['bench'], 'SRC is missing'), (['bench', 'SRC', '--peers'], 'leave out'), (['bench', '--peers', '--only', 'nothing', '--out', 'DST'], 'no row is called'), (['convert-ldm4', 'nowhere.ckpt', 'DST'], 'does not exist'),
    (['demo', '--out', 'SRC'], 'not empty'), (['demo', '--out', 'NEW', '--model', 'sd'], "--model 'sd': expected mini-ldm or mini-sd"), (['quantize', 'SRC', 'DST', '--fast', '--best'], 'exclude each other'), (['nonsense'], 'nonsense'), (['quantize', 'SRC', 'DST', '--nonsense'], 'nonsense')], ids=lambda a: ' '.join(a) if isinstance(a, list) else '')
def test_bad_input(pipe_folder, tmp_path, capsys, args, says):
    (tmp_path/'empty').mkdir(); (tmp_path/'foreign').mkdir(); (tmp_path/'foreign'/'thesis.txt').write_text('mine')
    args = [str(a).replace('SRC', str(pipe_folder)).replace('DST', str(tmp_path/'dst')).replace('EMPTY', str(tmp_path/'empty')).replace('FOREIGN', str(tmp_path/'foreign')) for a in args]
    code, out, err = aquatic(capsys, *args)
    assert code == 2 and says in err and out == '' and err.count('\n') == 1, err
    assert not (tmp_path/'dst').exists() and (tmp_path/'foreign'/'thesis.txt').exists() and (pipe_folder/'model_index.json').exists()

def test_pickled_components_are_refused(tmp_path, capsys):
    import torch
    pipe = class_pipe()
    pipe.save_pretrained(tmp_path/'p')
    (tmp_path/'p'/'vae'/'diffusion_pytorch_model.safetensors').unlink()
    torch.save(pipe.vae.state_dict(), tmp_path/'p'/'vae'/'diffusion_pytorch_model.bin')
    code, out, err = aquatic(capsys, 'sample', tmp_path/'p', '--out', tmp_path/'out', '--n', 1, '--steps', 1)
    assert code == 2 and 'safetensors' in err and not (tmp_path/'out').exists(), err

def test_no_memory(pipe_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, 'free_memory', lambda: 2**20)
    code, out, err = aquatic(capsys, 'quantize', pipe_folder, tmp_path/'dst', '--bits', 6)
    assert code == 3 and 'free' in err and not (tmp_path/'dst').exists()

def test_damaged_source(packed, tmp_path, capsys):
    import shutil
    shutil.copytree(packed, tmp_path/'m')
    path = tmp_path/'m'/'unet'/'diffusion_pytorch_model.safetensors'
    raw = bytearray(path.read_bytes()); raw[-50] ^= 1; path.write_bytes(raw)
    code, out, err = aquatic(capsys, 'info', tmp_path/'m')
    assert code == 2 and 'checksum' in err and str(path) in err

def test_unwritable_destination(pipe_folder, tmp_path, capsys):
    (tmp_path/'file').write_text('')
    code, out, err = aquatic(capsys, 'quantize', pipe_folder, tmp_path/'file'/'dst', '--work-dir', tmp_path/'w', *QUICK)
    assert code == 4 and 'cannot write' in err

def test_work_dir_in_use(pipe_folder, tmp_path, capsys):
    with work_lock(tmp_path/'w'):
        code, out, err = aquatic(capsys, 'quantize', pipe_folder, tmp_path/'dst', '--work-dir', tmp_path/'w', *QUICK)
    assert code == 2 and 'in use' in err

def test_sample_and_evaluate(packed, pipe_folder, tmp_path, capsys):
    for folder in ('a', 'b'):
        code, out, err = aquatic(capsys, 'sample', packed, '--out', tmp_path/folder, '--n', 3, '--steps', 2, '--seed', 5, '--json')
        assert code == 0 and len(json.loads(out)['images']) == 3, err
    assert [(tmp_path/'a'/f.name).read_bytes() == f.read_bytes() for f in sorted((tmp_path/'b').iterdir())] == [True]*3
    code, out, err = aquatic(capsys, 'evaluate', packed, '--against', pipe_folder, '--n', 3, '--steps', 2, '--json')
    assert code == 0 and json.loads(out)['psnr_db'] > 10

def test_bench(packed, capsys):
    code, out, err = aquatic(capsys, 'bench', packed, '--batch', 1, '--repeats', 1, '--json')
    assert code == 0, err
    assert {'dense', 'unpacked'} <= set(json.loads(out)['seconds'])

def test_version_and_help(capsys):
    code, out, err = aquatic(capsys, 'version', '--json')
    assert code == 0 and json.loads(out)['aquatic_nb'] == aquatic_nb.__version__
    for command in ('quantize', 'sample', 'evaluate', 'info', 'bench', 'demo', 'convert-ldm4', 'version'):
        code, out, err = aquatic(capsys, command, '--help')
        assert code == 0 and 'Usage: aquatic ' + command in out

class Angry(UNet2DModel):
    def forward(self, *args, **kwargs): raise RuntimeError('mat1 and mat2\nmust have the same dtype')

def test_any_error_is_one_line(pipe_folder, tmp_path, capsys, monkeypatch):
    "A model's own forward may raise whatever it likes."
    monkeypatch.setattr(UNet2DModel, 'forward', Angry.forward)
    for command, expected in ((['sample', pipe_folder, '--out', tmp_path/'out'], 1), (['quantize', pipe_folder, tmp_path/'dst', '--bits', 6], 2)):
        code, out, err = aquatic(capsys, *command)
        line = err.rstrip('\n').rpartition('\n')[2]
        assert code == expected and line.startswith('aquatic: ') and 'RuntimeError: mat1 and mat2 must have' in line and 'Traceback' not in err, err
        assert '--debug' in line or expected == 2 and 'calibration_kwargs' in line, line
    code, out, err = aquatic(capsys, *command, '--debug')
    assert code == 2 and 'Traceback' in err and 'in forward' in err

@pytest.mark.parametrize('error, code', [(RuntimeError('a'), 1), (AssertionError('a'), 1), (KeyError('a'), 1), (MemoryError(), 3), (torch.OutOfMemoryError('a'), 3),
    (cli.NotEnoughMemory('a'), 3), (ValueError('a'), 2), (TypeError('a'), 2), (FileExistsError('a'), 2), (PermissionError(13, 'a'), 4), (KeyboardInterrupt(), 130)])
def test_codes(capsys, monkeypatch, error, code):
    def fail(): raise error
    monkeypatch.setattr(cli, '_machine', fail)
    found, out, err = aquatic(capsys, 'info')
    assert found == code and out == '' and err.count('\n') == 1 and err.startswith('aquatic: '), err

def test_warnings_are_one_line(capsys, monkeypatch):
    import warnings
    monkeypatch.setattr(cli, '_machine', lambda: warnings.warn('layers\nstay dense') or {})
    code, out, err = aquatic(capsys, 'info')
    assert code == 0 and err == 'note: layers stay dense\n'

def test_one_guidance(capsys):
    "The default is stated once, in `walk`; the benchmark's is its protocol's."
    for command in ('sample', 'bench', 'evaluate'):
        code, out, err = aquatic(capsys, command, '--help')
        text = ' '.join(out.split())
        assert re.search(rf'--guidance\b.*?{SAMPLING_GUIDANCE:g}\b', text), text
    source = (Path(cli.__file__)).read_text()
    assert not re.search(r'guidance\w*\s*=\s*\d', source)

def test_doors_are_rooms():
    "`import aquatic_nb` is enough: each door opens when it is named, and `cli` names doors only."
    source = (Path(cli.__file__)).read_text() + (Path(cli.__file__).with_name('sources.py')).read_text()
    named = set(re.findall(r'aquatic_nb\.(\w+)', re.sub(r'#.*', '', source))) - {'__version__'}
    assert named <= set(aquatic_nb._DOORS), named
    for name in named: assert getattr(aquatic_nb, name).__name__.startswith('aquatic_nb.')
    with pytest.raises(AttributeError, match='nothing'): aquatic_nb.nothing

def test_help_is_quick():
    "Nothing heavy is imported but torch, for help and for the version."
    code = "import sys; from aquatic_nb import cli\nfor command in ('--help', 'version'):\n    try: cli.main([command])\n    except SystemExit: pass\n" \
           "print([o for o in ('diffusers', 'numba', 'pandas', 'matplotlib', 'torch_fidelity', 'accelerate') if o in sys.modules])"
    found = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert 'quantize' in found.stdout and found.stdout.strip().endswith('[]'), found.stdout

def test_bars_move(capsys):
    "A stage that says nothing has a clock that is drawn again."
    with cli._stages('work', 1, every=.02) as (stage, seconds): stage('silence', lambda: time.sleep(.6))
    err = capsys.readouterr().err
    assert err.count('work: silence (0/1') > 5 and 'work: silence (1/1' in err

def test_demo_says_how_long_it_takes():
    pipe = class_pipe()
    few, many = (cli._demo_minutes(pipe, n, 2., 1000) for n in (10, 10_000))
    assert 2 < few and 2 < many
    said = cli._announcement(cli._SHOWN['mini-sd'], dict(bits=2., tune=2.), 200, 7.6)
    assert '200 images' in said and 'mini_sd' in said and '2 bits' in said and 'About 8 minutes here' in said and '\n' not in said

def test_interrupt_can_be_resumed(packed, pipe_folder, tmp_path, capsys, monkeypatch):
    "Ctrl-C after the third layer: code 130, a message that says how to go on, and the bytes of an unbroken run in the end."
    put, made = WorkDir.put, []
    def interrupted(self, *args):
        put(self, *args)
        made.append(args[0])
        if len(made) == 3: os.kill(os.getpid(), signal.SIGINT)
    command = ['quantize', pipe_folder, tmp_path/'dst', *QUICK]
    before = signal.signal(signal.SIGINT, signal.default_int_handler) # a shell's job in the background ignores it
    with monkeypatch.context() as patch:
        patch.setattr(WorkDir, 'put', interrupted)
        try: code, out, err = aquatic(capsys, *command)
        finally: signal.signal(signal.SIGINT, before)
    assert code == 130 and out == '' and 'run the same command again' in err and err.endswith('aquatic: interrupted\n'), err[-800:]
    assert len(made) < len(list(packed_layers(load_quantized(packed/'unet')))) and (tmp_path/'dst.work').exists() and not (tmp_path/'dst').exists()
    code, out, err = aquatic(capsys, *command)
    assert code == 0 and 'going on with' in err and not (tmp_path/'dst.work').exists(), err[-800:]
    files = sorted(packed.rglob('*.safetensors'))
    assert files and all(f.read_bytes() == (tmp_path/'dst'/f.relative_to(packed)).read_bytes() for f in files)

def test_the_model_of_prompts_needs_none_here(tmp_path, capsys):
    code, out, err = aquatic(capsys, 'sample', 'mini-sd', '--out', tmp_path/'s', '--n', 2, '--steps', 1, '--json')
    assert code == 0 and len(json.loads(out)['images']) == 2, err[-800:]
    code, out, err = aquatic(capsys, 'evaluate', 'mini-sd', '--n', 2, '--steps', 1, '--json')
    assert code == 0 and {'accuracy', 'group', 'retrieval'} <= json.loads(out).keys(), err[-800:]
    code, out, err = aquatic(capsys, 'sample', 'mini-sd', '--out', tmp_path/'t', '--n', 1, '--steps', 1, '--prompt', 'a lemon')
    assert code == 0, err[-800:]

def test_only_emoji_are_judged_as_emoji():
    "Somebody's class-conditional model of 64x64 pixels in colour is not asked which emoji it drew."
    images = torch.rand(3, 3, 64, 64)
    assert set(cli._judge(images, [0, 500, 999], images.flip(0))) == {'n', 'psnr_db'}
    assert {'accuracy', 'retrieval'} <= set(cli._judge(images, [0, 5, 9], emoji=True))

@pytest.mark.parametrize('shown', ['_by_class', '_in_pairs'])
@pytest.mark.parametrize('n', [1, 7, 40])
def test_pictures_of_the_demo(shown, n, tmp_path):
    "Any number of images; a picture that is read back, with more than one colour."
    images = torch.rand(n, 1 if shown == '_by_class' else 3, 16, 16)
    names = [f'a thing number {i} on a ground' if shown == '_in_pairs' else 'ABC'[i % 3] for i in range(n)]
    getattr(cli, shown)(images, images.flip(0), names, tmp_path/'p.png')
    from PIL import Image
    with Image.open(tmp_path/'p.png') as found: assert min(found.size) > 80 and len(found.getcolors(10**7)) > 20

@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize('model', ['mini-ldm', 'mini-sd'])
def test_demo(model, tmp_path, capsys):
    code, out, err = aquatic(capsys, 'demo', '--model', model, '--out', tmp_path/'demo', '--n', 40, '--json')
    assert code == 0, err[-2000:]
    found = json.loads(out)
    assert 'minutes here' in err and found['estimated_minutes'] > 2 and Path(found['model']).is_dir()
    assert found['bits_quantized'] <= 2.2 and found['psnr_db'] > (30 if model == 'mini-ldm' else 12) and found['file_bytes'] < found['file_bytes_original']/5
    assert {o.name for o in (tmp_path/'demo').iterdir()} == {'model', 'report.md', 'report.csv', 'side_by_side.png'}
    code, out, err = aquatic(capsys, 'sample', tmp_path/'demo'/'model', '--out', tmp_path/'s', '--n', 1, '--steps', 1)
    assert code == 0, err
