"""Two gloo processes on a tiny model: layers encoded together, distillation with averaged gradients; each with one process killed and all started again.
As a script it is one of the processes: test_distributed.py encode|tune|minutes OUT; DIE='rank:n' makes that rank kill itself before its n-th layer or step."""
import aquatic_nb # noqa: F401  first: torchvision may lack its operators
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from aquatic_nb import ldm4, pack
from aquatic_nb.calib import calibration_batches
from aquatic_nb.core import Run
from aquatic_nb.layers import packed_layers
from aquatic_nb.quant import quantize_unet
from aquatic_nb.tune import distill as tuning
from aquatic_nb.tune.distill import Teacher, TuneConfig, distill, distillation_loss, iid_batch
from ldm4_worker import tiny_pipe

pytestmark = pytest.mark.timeout(1200) # several launches each, and a busy machine takes its time over imports
QUICK = dict(laq=False, sweeps=1, beam=2, workers=1, progress=False)
TUNE = TuneConfig(bf16=False, steps=6, batch=4, code_every=2, warmup=1, held_every=2, seed=5)


def encoded(work_dir=None, spread=None, **kwargs):
    pipe = tiny_pipe()
    batches = calibration_batches(pipe.unet, pipe, 2, steps=2)
    return quantize_unet(pipe.unet, 7, calibration=batches, work_dir=work_dir, spread=spread, **QUICK, **kwargs)


def teacher(): # of a tiny model, one to choose by, and its student
    pipe = tiny_pipe()
    student = quantize_unet(tiny_pipe().unet, 7, calibration=None, **QUICK)
    return *(Teacher(pipe, pipe.unet, n, batch=4, steps=3, seed=n) for n in (2, 1)), student


def deadly(f, steps):
    "A function that kills its process before its n-th call."
    left = [steps]
    def g(*args):
        left[0] -= 1
        if left[0] < 0: os.kill(os.getpid(), signal.SIGKILL)
        return f(*args)
    return g


def main(task, out):
    torch.set_num_threads(1)
    out, state, log = Path(out), ldm4.ranks(), None
    rank, at = map(int, os.environ.get('DIE', '-1:0').split(':'))
    if rank == state.process_index:
        where, name = (pack, '_encode_one') if task == 'encode' else (tuning.Tuner, 'train_step')
        setattr(where, name, deadly(getattr(where, name), at))
    if task == 'encode': model = encoded(out/'layers' if state.is_main_process else None, ldm4.Spread(state))
    else:
        walks, held, model = teacher()
        config = TUNE if task == 'tune' else replace(TUNE, steps=None, minutes=.25)
        if task == 'minutes' and state.process_index: tuning.Pace.goes_on = lambda self, step: 1/0 # its clock is not asked
        log = ldm4.distill_ranks(model, walks, config, held, checkpoint=out/'tuning.pt', every_minutes=0, run=Run(progress=False))
    torch.save(dict(model=model.state_dict(), log=log), out/f'rank{state.process_index}.pt')


def launch(task, out, processes=2, die=None):
    env = dict(os.environ, OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='', PYTHONPATH=os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get('PYTHONPATH', '')]))
    if die: env['DIE'] = die
    how = ['--multi_gpu', '--num_processes', str(processes), '--num_machines', '1', '--mixed_precision', 'no', '--dynamo_backend', 'no', '--main_process_port', '0']
    return subprocess.run([sys.executable, '-m', 'accelerate.commands.launch', *how, __file__, task, str(out)], env=env, capture_output=True, text=True, timeout=400)


def saved(out, what='model'): return [torch.load(f, weights_only=True)[what] for f in sorted(Path(out).glob('rank*.pt'))]


def same(a, b):
    assert a.keys() == b.keys()
    for n in a: assert torch.equal(a[n], b[n]), n


def test_layers_of_two_processes_one_killed_are_those_of_one(tmp_path):
    alone = encoded()
    first = launch('encode', tmp_path, die='1:5')
    kept = len(list((tmp_path/'layers').glob('*.safetensors')))
    assert first.returncode != 0 and not saved(tmp_path) and 0 < kept < len(packed_layers(alone))
    second = launch('encode', tmp_path)
    assert second.returncode == 0, second.stderr[-3000:]
    assert len(saved(tmp_path)) == 2
    for state in saved(tmp_path): same(state, alone.state_dict())


@pytest.fixture(scope='module')
def tuned(tmp_path_factory):
    "The folder of an undisturbed run of two processes."
    out = tmp_path_factory.mktemp('tuned')
    done = launch('tune', out)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def test_distillation_in_two_processes_averages_gradients(tuned):
    one, two = saved(tuned)
    same(one, two)
    walks, held, by_hand = teacher() # one process that takes both batches, one after the other
    before = {k: v.clone() for k, v in by_hand.state_dict().items()}
    seeds = [TUNE.seed, TUNE.seed + 1_000_003]

    def both(run):
        params = [p for g in run.optimizer.param_groups for p in g['params'] if p.grad is not None]
        mine = [p.grad.clone() for p in params]
        run.optimizer.zero_grad(set_to_none=True)
        distillation_loss(run.student, iid_batch(run.teacher, run.step, TUNE.batch, seeds[1])).backward()
        for p, g in zip(params, mine): p.grad.copy_((p.grad + g)/2)
        return {}

    log = distill(by_hand, walks, TUNE, held, watch=both, run=Run(progress=False))
    assert any(not torch.equal(before[k], v) for k, v in by_hand.state_dict().items())
    for k, v in by_hand.state_dict().items(): torch.testing.assert_close(one[k].float(), v.float(), rtol=1e-4, atol=1e-5, msg=k)
    first, second = saved(tuned, 'log')
    assert [r['loss'] for r in first[:-1]] == pytest.approx([r['loss'] for r in log[:-1]], rel=1e-4) # rank 0 is shown the same, rank 1 other batches
    assert all(a['loss'] != b['loss'] for a, b in zip(first[:-1], second[:-1])) and first[-1]['held'] == second[-1]['held'] == pytest.approx(log[-1]['held'], rel=1e-4)


@pytest.mark.parametrize('die', ['1:3', pytest.param('0:4', marks=pytest.mark.slow), pytest.param('1:0', marks=pytest.mark.slow)])
def test_a_tuning_process_killed_and_all_restarted_end_with_the_same_weights(tuned, tmp_path, die):
    rank, at = map(int, die.split(':'))
    assert launch('tune', tmp_path, die=die).returncode != 0 and not saved(tmp_path)
    assert {f.name for f in tmp_path.iterdir() if f.suffix != '.tmp'} == ({'tuning.pt'} if at else set()) # a file that was being written has another name
    if at:
        state = torch.load(tmp_path/'tuning.pt', weights_only=True)
        assert 0 < state['step'] <= at and state['world'] == 2
        walks, held, alone = teacher()
        with pytest.raises(ValueError, match='made by 2 processes'): distill(alone, walks, TUNE, held, checkpoint=tmp_path/'tuning.pt', run=Run(progress=False))
    second = launch('tune', tmp_path)
    assert second.returncode == 0, second.stderr[-3000:]
    for state in saved(tmp_path): same(state, saved(tuned)[0])
    a, b = saved(tuned, 'log'), saved(tmp_path, 'log')
    assert [[r['loss'] for r in log[:-1]] for log in b][0] == [r['loss'] for r in a[0][:-1]] and b[1][-2]['loss'] == a[1][-2]['loss'] # rank 1 is back in its own stream


def test_minutes_are_those_of_the_first_process(tmp_path):
    done = launch('minutes', tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    same(*saved(tmp_path))
    logs = saved(tmp_path, 'log')
    steps = [log[-1]["step"] for log in logs]
    assert steps == [len(logs[0]) - 1]*2 and steps[0] >= 3


def test_one_process_needs_no_launcher():
    lonely = SimpleNamespace(num_processes=1, process_index=0, is_main_process=True)
    same(encoded(spread=ldm4.Spread(lonely)).state_dict(), encoded().state_dict())


def test_an_error_names_rank_and_layer(monkeypatch):
    lonely = SimpleNamespace(num_processes=1, process_index=0, is_main_process=True)
    with pytest.raises(RuntimeError, match="rank 0, layer 'b': out of luck"): list(ldm4.Spread(lonely).share(lambda n: n if n == 'a' else 1/0 if n == 'c' else exec("raise ValueError('out of luck')"), ['a', 'b', 'c']))


if __name__ == '__main__': main(*sys.argv[1:])
