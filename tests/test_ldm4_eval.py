"The full evaluation in small: processes, kills, resumes, refusals; and the plans of other architectures."
import json
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st

import ldm4_worker as worker
from aquatic_nb import ldm4, metrics
from aquatic_nb.core import digest
from aquatic_nb.cpu import count_flops
from aquatic_nb.eval import samples

warnings.filterwarnings('ignore', message='.*covariance has rank.*')
WORKER = Path(worker.__file__)


def launch(out, processes=2, die=None):
    "Run the worker in several processes on the CPU, by `accelerate launch`."
    env = dict(os.environ, OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='', PYTHONPATH=os.pathsep.join([str(WORKER.parents[1]), os.environ.get('PYTHONPATH', '')]))
    if die: env['DIE'] = die
    how = ['--multi_gpu', '--num_processes', str(processes), '--num_machines', '1', '--mixed_precision', 'no', '--dynamo_backend', 'no', '--main_process_port', '0']
    return subprocess.run([sys.executable, '-m', 'accelerate.commands.launch', *how, str(WORKER), str(out)], env=env, capture_output=True, text=True, timeout=300)


def contents(folder):
    return {str(o.relative_to(folder)): o.read_bytes() for o in sorted(Path(folder).rglob('*')) if o.suffix in ('.npz', '.json') and o.name != 'run.json'}


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp('alone')
    return out, worker.main(out)


def test_two_processes_one_killed_and_restarted_give_the_bytes_of_one(alone, tmp_path):
    out, table = alone
    first = launch(tmp_path, die='1:2')
    assert first.returncode != 0 and not (tmp_path/'run.json').exists()
    left = contents(tmp_path)
    assert 0 < len(left) < len(contents(out)) and not any(o.name.endswith('.tmp') and o.suffix == '.npz' for o in tmp_path.rglob('*'))
    second = launch(tmp_path)
    assert second.returncode == 0, second.stderr[-3000:]
    assert contents(tmp_path) == contents(out)
    again, record = ldm4.load_run(tmp_path/'run.json')
    pd.testing.assert_frame_equal(again, table, check_exact=True, check_names=False)
    assert record['processes'] == 2 and record['models']['full precision']['shards_found'] > 0
    assert record['results'] == json.loads((out/'run.json').read_text())['results']


@pytest.mark.slow
def test_kills_at_every_stage(alone, tmp_path):
    out, table = alone
    dies = '0:1', '1:1', '0:1', '0:2', '1:0', '0:1', '0:0' # rank 0 has the more files; a rank with nothing left to write lives on
    kills = [launch(tmp_path, die=die).returncode != 0 for die in dies]
    assert sum(kills) >= 4
    launch(tmp_path)
    (tmp_path/'coarse'/'pairs-000000-000003.npz').unlink()
    assert launch(tmp_path, 3).returncode == 0 # and with another number of processes
    assert contents(tmp_path) == contents(out)
    pd.testing.assert_frame_equal(ldm4.load_run(tmp_path/'run.json')[0], table, check_exact=True, check_names=False)


@pytest.mark.slow
def test_the_shipped_model_in_two_processes_one_killed(tmp_path, monkeypatch):
    monkeypatch.setenv('MODEL', 'shipped')
    table = worker.main(tmp_path/'alone')
    assert launch(tmp_path/'two', die='0:2').returncode != 0
    assert launch(tmp_path/'two').returncode == 0
    assert contents(tmp_path/'two') == contents(tmp_path/'alone')
    pd.testing.assert_frame_equal(ldm4.load_run(tmp_path/'two'/'run.json')[0], table, check_exact=True, check_names=False)


def test_the_run_file_tells_how_it_was_made(alone):
    out, table = alone
    again, record = ldm4.load_run(out/'run.json')
    pd.testing.assert_frame_equal(again, table, check_exact=True, check_names=False)
    assert {'command', 'date', 'machine', 'versions', 'protocol', 'models', 'processes'} <= set(record)
    assert record['protocol']['samples'] == 20 and record['protocol']['steps_taken'] == 4 and record['not_computed']['coarse'] == {'LPIPS': 'no LPIPS was given'}
    assert again.images.tolist() == [20, 20] and np.isnan(again.PSNR.iloc[0]) and again.PSNR.iloc[1] > 10


def test_metrics_from_shards_are_those_of_all_images(alone):
    out, table = alone
    judge, protocol = worker.tiny_judge(), worker.PROTOCOL
    images = [np.concatenate([np.load(samples.shard_path(out/f, 'images', a, b))['arr_0'] for a, b in protocol.shards]) for f in ('full_precision', 'coarse')]
    whole = metrics.evaluate_images(images[1], judge.reference, judge.extractor)
    for name in ('FD', 'sFD', 'ISC', 'precision'): assert table.loc['coarse', name] == pytest.approx(whole[name], rel=1e-9)
    assert table.loc['coarse', 'PSNR'] == pytest.approx(metrics.paired_psnr(*images), rel=1e-12)
    labels = samples.make_labels(20, 5)
    assert table.loc['coarse', 'accuracy'] == metrics.class_accuracy(images[1], labels, judge.extractor)
    assert np.array_equal(labels, np.concatenate([np.load(samples.shard_path(out/'coarse', 'images', a, b))['arr_1'] for a, b in protocol.shards]))


@pytest.mark.parametrize('steps, taken', [(20, 20), (30, 31), (15, 16), (7, 8)])
def test_the_protocol_takes_the_original_samplers_steps_and_says_how_many(tmp_path, steps, taken):
    "As many calls of the model as it says, at the original's times."
    pipe, seen = worker.tiny_pipe(), []
    pipe.unet.register_forward_pre_hook(lambda m, args, kw: seen.append(int(kw['timestep'])), with_kwargs=True)
    protocol = ldm4.Protocol(samples=1, steps=steps)
    table = ldm4.evaluate_models(pipe, {'full precision': None}, tmp_path, protocol, ldm4.Judge(missing={'extractor': 'none'}), progress=False)
    assert table.attrs['not_computed']['full precision']['FID'] == 'none'
    assert [t - 1 for t in seen] == list(range(0, 1000, 1000//steps))[::-1]
    assert len(seen) == taken == ldm4.load_run(tmp_path/'run.json')[1]['protocol']['steps_taken'] == protocol.steps_taken


def test_steps_that_the_original_cannot_take_are_refused_before_any_work(tmp_path):
    called = []
    with pytest.raises(ValueError, match='asks for time 1000'):
        ldm4.evaluate_models(worker.tiny_pipe(), {'full precision': lambda pipe: called.append(1)}, tmp_path, ldm4.Protocol(samples=2, steps=3), worker.tiny_judge())
    assert not called and not list(tmp_path.iterdir())


def test_damaged_shards_are_drawn_again(alone, tmp_path):
    out, _ = alone
    pipe, labels = worker.tiny_pipe(), samples.make_labels(20, 5)
    samples.sample_shards(pipe, labels, tmp_path, worker.PROTOCOL)
    whole = contents(tmp_path)
    assert whole == {k.split('/')[1]: v for k, v in contents(out).items() if k.startswith('full_precision/images')}
    files = sorted(tmp_path.glob('*.npz'))
    files[0].write_bytes(b'')
    files[1].write_bytes(files[1].read_bytes()[:-30])
    files[2].write_bytes(b'not a zip file at all')
    samples.write_npz(files[3], arr_0=np.zeros((3, 4, 4, 1), np.uint8), arr_1=np.zeros(3, np.int64)) # other labels
    files[4].unlink()
    samples.sample_shards(pipe, labels, tmp_path, worker.PROTOCOL)
    assert contents(tmp_path) == whole


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 400), st.integers(1, 60), st.integers(1, 9))
def test_every_sample_belongs_to_exactly_one_rank(n, size, world):
    shards = ldm4.Protocol(samples=n, shard_size=size).shards
    drawn = [i for rank in range(world) for a, b in shards[rank::world] for i in range(a, b)]
    assert sorted(drawn) == list(range(n))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**40), st.lists(st.integers(0, 10**6), min_size=1, max_size=4))
def test_noise_of_a_sample_does_not_depend_on_its_company(seed, indices):
    class Net: config = type('C', (), dict(in_channels=2, sample_size=(3, 4)))
    batch = samples.sample_noise(Net, seed, indices)
    assert batch.shape == (len(indices), 2, 3, 4)
    for k, i in enumerate(indices): assert samples.sample_noise(Net, seed, [i])[0].equal(batch[k])


def test_labels():
    assert samples.make_labels(10, 5, 'balanced').tolist() == [0, 1, 2, 3, 4]*2
    assert np.array_equal(samples.make_labels(3000, 1000, seed=1)[:70], samples.make_labels(70, 1000, seed=1))
    assert not np.array_equal(samples.make_labels(70, 1000, seed=1), samples.make_labels(70, 1000, seed=2))
    for bad in ([0, 1, 5], [0, -1, 1], [0., 1., 2.], [0, 1], 'sorted'):
        with pytest.raises(ValueError, match='labels: .*(classes 0..4|expected 3 integers|3 integers$)'): samples.make_labels(3, 5, bad)


@pytest.mark.parametrize('change', [dict(seed=1), dict(steps=5), dict(guidance_scale=1.), dict(samples=21), dict(original_timesteps=False)])
def test_a_folder_belongs_to_one_protocol(alone, change):
    out, _ = alone
    other = ldm4.Protocol(**{**vars(worker.PROTOCOL), **change})
    before = contents(out)
    with pytest.raises(ValueError, match='full_precision holds samples with'):
        ldm4.evaluate_models(worker.tiny_pipe(), {'full precision': None}, out, other, worker.tiny_judge(), progress=False)
    assert contents(out) == before


def test_a_folder_belongs_to_one_model(alone):
    out, _ = alone
    with pytest.raises(ValueError, match='model='):
        ldm4.evaluate_models(worker.tiny_pipe(), {'full precision': None, 'coarse': lambda pipe: pipe.unet}, out, worker.PROTOCOL, worker.tiny_judge(), progress=False)


def test_missing_parts_are_named_and_nothing_is_put_in_their_place(tmp_path):
    protocol = ldm4.Protocol(samples=2, steps=2, shard_size=1, batch_size=1)
    judge = ldm4.make_judge('inception', tmp_path/'ref.npz', lambda: metrics.lpips_distance(tmp_path/'vgg.pth'), weights=tmp_path/'inception.pth')
    table = ldm4.evaluate_models(worker.tiny_pipe(), {'full precision': None, 'coarse': worker.coarse}, tmp_path/'out', protocol, judge, progress=False)
    why = table.attrs['not_computed']['coarse']
    assert set(why) == {'FID', 'sFID', 'ISC', 'precision', 'recall', 'LPIPS'} and table.loc['coarse', list(why)].isna().all()
    assert 'inception.pth' in why['FID'] and 'vgg.pth' in why['LPIPS'] and np.isfinite(table.loc['coarse', ['PSNR', 'SSIM']]).all()
    assert 'ref.npz' in judge.missing['reference']


def test_wrong_reference_is_named(tmp_path):
    np.savez(tmp_path/'ref.npz', images=np.zeros(3))
    judge = ldm4.make_judge(worker.tiny_judge().extractor, tmp_path/'ref.npz')
    assert "holds ['images']" in judge.missing['reference']


def test_reference_of_another_network_costs_only_what_needs_it(tmp_path):
    judge = worker.tiny_judge()
    other = metrics.Extractor('other', lambda x: dict(features=x.float().mean((2, 3))), channels=1)
    judge.reference = metrics.feature_stats(torch.randint(256, (9, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)), other)
    table = ldm4.evaluate_models(worker.tiny_pipe(), {'full precision': None}, tmp_path, ldm4.Protocol(samples=12, steps=1), judge, progress=False)
    assert 'one extractor' in table.attrs['not_computed']['full precision']['FD'] and table.ISC.iloc[0] >= 1


def test_no_checkpoint_no_numbers(tmp_path):
    with pytest.raises(FileNotFoundError, match='none of FID, sFID.*PSNR.*was computed'): ldm4.evaluate_ldm4(tmp_path/'no.ckpt', tmp_path)
    ours = ldm4.results_table(tmp_path/'no.json').query("method.str.startswith('aquatic')")
    assert (ours.status == 'not run here').all() and ours[['FID', 'sFID', 'ISC', 'MB']].isna().all(None)


def test_evaluate_ldm4_end_to_end_with_a_stand_in(tmp_path, capsys):
    (tmp_path/'model.ckpt').write_bytes(b'x')
    asked = []
    def make(bits, act_bits, work_dir):
        asked.append((bits, act_bits, work_dir.name))
        return worker.coarse
    table = ldm4.evaluate_ldm4(tmp_path/'model.ckpt', tmp_path/'out', bits=(4, 1.5), act_bits=8, protocol=ldm4.Protocol(samples=4, steps=2, shard_size=2, batch_size=2),
                               inception=tmp_path/'none.pth', load=lambda path: worker.tiny_pipe(), make=make, progress=False)
    assert table.index.tolist() == ['full precision', 'W4A8', 'W1.5A8'] and asked == [(4, 8, 'W4A8'), (1.5, 8, 'W1.5A8')]
    assert table.PSNR.iloc[1] == table.PSNR.iloc[2] > 0
    assert 'not available: extractor' in capsys.readouterr().err
    shown = ldm4.results_table(tmp_path/'out'/'run.json').set_index('method')
    assert shown.loc['aquatic_nb, W4A8', 'status'] == 'measured' and np.isnan(shown.loc['aquatic_nb, W4A8', 'FID'])
    assert shown.loc['aquatic_nb, W2A8', 'status'] == 'not run here' and shown.loc['QuEST', 'status'].eq('published').all()
    assert 'sha256' in json.loads((tmp_path/'out'/'run.json').read_text())['note']


def test_pipeline_is_left_as_it_was(tmp_path):
    pipe = worker.tiny_pipe()
    unet, key = pipe.unet, digest(pipe.unet)
    ldm4.evaluate_models(pipe, {'full precision': None, 'coarse': worker.coarse}, tmp_path, ldm4.Protocol(samples=2, steps=1), worker.tiny_judge(), progress=False)
    assert pipe.unet is unet and digest(unet) == key


# ---- plans ----

@pytest.mark.parametrize('name', list(ldm4.CONFIGS))
def test_plans_count_what_the_authors_published(name):
    plan = ldm4.model_plan(name)
    assert plan.weights['total'] == ldm4.CONFIGS[name]['parameters']
    assert plan.weights.drop('total').sum() == plan.weights['total'] and plan['share'].drop('total').sum() == pytest.approx(1)
    assert plan['fp16 MB']['total'] == pytest.approx(2*plan.weights['total']/1e6)
    if name != 'DiT-XL/2': assert 0 < plan.weights['conv in/out'] < .01*plan.weights['total']


def test_work_is_what_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode
    model = ldm4.meta_model('LDM-4')
    inputs = ldm4.example_inputs(model, 1)
    with FlopCounterMode(display=False) as counter, torch.no_grad(): model(**inputs)
    by_op = {str(k): v for k, v in counter.get_flop_counts()['Global'].items()}
    assert count_flops(model, inputs).dense.sum() == sum(v for k, v in by_op.items() if 'bmm' not in k)


def test_plan_of_a_model_with_weights_and_no_text():
    from diffusers import UNet2DModel
    model = UNet2DModel(sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, down_block_types=('DownBlock2D', 'AttnDownBlock2D'),
                        up_block_types=('AttnUpBlock2D', 'UpBlock2D'))
    plan = ldm4.model_plan(model)
    assert plan.weights['total'] == model.num_parameters() and plan.GFLOP['total'] > 0


def test_a_quantized_copy_is_calibrated_by_the_pipeline_and_leaves_it_alone():
    pipe = worker.tiny_pipe()
    unet, key = pipe.unet, digest(pipe.unet)
    made = ldm4.quantized_copy(6, n_calibration=2, sweeps=1, beam=2, laq=False, progress=False)(pipe)
    assert pipe.unet is unet and digest(unet) == key != digest(made)
    assert digest(pickle.loads(pickle.dumps(made))) == digest(made) # as ranks hand it on
