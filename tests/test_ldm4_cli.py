"`aquatic evaluate ldm4`, the whole way from the command line, on a tiny pipeline."
import aquatic_nb # noqa: F401  first: torchvision may lack its operators
import json

import pytest

from aquatic_nb import cli, ldm4
from ldm4_worker import tiny_pipe


def aquatic(capsys, *args):
    "Run a command in this process: exit code, stdout, stderr."
    capsys.readouterr()
    with pytest.raises(SystemExit) as e: cli.main([str(a) for a in args])
    return (e.value.code or 0, *capsys.readouterr())


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp('cli')/'converted'
    tiny_pipe().save_pretrained(path)
    return path


def test_benchmark_from_the_command_line(folder, tmp_path, capsys, monkeypatch):
    whole, asked = ldm4.quantize_unet, []
    def quick(unet, **kwargs):
        asked.append((kwargs['bits'], kwargs['act_bits']))
        return whole(unet, **kwargs, laq=False, sweeps=1, beam=2, n_calibration=2, progress=False)
    monkeypatch.setattr(ldm4, 'quantize_unet', quick)
    args = ['evaluate', 'ldm4', '--ckpt', folder, '--bits', 7, '--bits', 8, '--act-bits', 8, '--scale', 2.0, '--steps', 2, '--samples', 4, '--labels', 'balanced',
            '--inception', tmp_path/'none.pth', '--vgg', tmp_path/'vgg.pth', '--out', tmp_path/'out', '--json']
    code, out, err = aquatic(capsys, *args)
    assert code == 0, err
    found = json.loads(out) # nothing but the result
    assert 'sha256' in err
    assert list(found['results']) == ['full precision', 'W7A8', 'W8A8'] and asked == [(7, 8), (8, 8)]
    assert found['results']['W8A8']['PSNR'] > 10 and found['results']['W8A8']['FID'] is None
    assert 'none.pth' in found['not_computed']['W7A8']['sFID'] and 'vgg.pth' in found['not_computed']['W7A8']['LPIPS']
    _, record = ldm4.load_run(tmp_path/'out'/'run.json')
    assert record['protocol'] == dict(samples=4, steps=2, guidance_scale=2., eta=0., labels='balanced', seed=0, shard_size=250, batch_size=25,
                                      original_timesteps=True, steps_taken=2)
    code, out, err = aquatic(capsys, *args[:-1]) # again: nothing is drawn, and a person reads a table
    assert code == 0 and 'not computed: FID' in out and 'W7A8' in out
    assert all(o['shards_found'] for o in ldm4.load_run(tmp_path/'out'/'run.json')[1]['models'].values())
    code, out, err = aquatic(capsys, *args, '--seed', 1)
    assert code == 2 and 'seed=0' in err


@pytest.mark.parametrize('args, says', [([], '--ckpt is missing'), (['--ckpt', 'no.ckpt'], 'none of FID'), (['--ckpt', 'CKPT', '--act-bits', '5'], '--act-bits 5'),
    (['--ckpt', 'CKPT', '--labels', 'sorted'], "labels='sorted'"), (['--ckpt', 'CKPT', '--samples', '0'], '--samples'), (['--ckpt', 'CKPT', '--against', 'mini-ldm'], 'leave them out')])
def test_bad_requests(folder, tmp_path, capsys, args, says):
    code, out, err = aquatic(capsys, 'evaluate', 'ldm4', '--out', tmp_path/'out', *[str(folder) if a == 'CKPT' else a for a in args])
    assert code == 2 and says in err and out == '' and not (tmp_path/'out').exists(), err


def test_both_spellings_of_the_converter(capsys):
    for name in ('convert-ldm4', 'convert_ldm4'):
        code, out, err = aquatic(capsys, name, 'nowhere.ckpt', 'dst')
        assert code == 2 and 'does not exist' in err
