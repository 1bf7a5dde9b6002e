"""Two gloo processes on a tiny model: layers encoded together, one process killed and all started again, distillation with averaged gradients.
As a script it is one of the processes: test_distributed.py encode|tune OUT; DIE='rank:n' makes that rank kill itself before its n-th layer."""
import aquatic_nb # noqa: F401  first: torchvision may lack its operators
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from aquatic_nb import ldm4, quant
from aquatic_nb.calib import calibration_batches
from aquatic_nb.layers import packed_layers
from aquatic_nb.quant import quantize_unet
from aquatic_nb.semi_pv import Teacher, TuneConfig, class_conditions, distill
from ldm4_worker import tiny_pipe

QUICK = dict(laq=False, sweeps=1, beam=2, workers=1, progress=False)
TUNE = TuneConfig(steps=3, batch=4, code_every=2, warmup=1, held_every=50, seed=5)


def encoded(work_dir=None, spread=None, **kwargs):
    pipe = tiny_pipe()
    batches = calibration_batches(pipe.unet, pipe, 2, steps=2)
    return quantize_unet(pipe.unet, 7, calibration=batches, work_dir=work_dir, spread=spread, **QUICK, **kwargs)


def teacher(): # of a tiny model, and its student
    pipe = tiny_pipe()
    student = quantize_unet(tiny_pipe().unet, 7, calibration=None, **QUICK)
    return Teacher(pipe.unet, pipe.scheduler, class_conditions(pipe), n_walks=2, batch=4, steps=3), student


def main(task, out):
    torch.set_num_threads(1)
    out, state = Path(out), ldm4.ranks()
    rank, at = map(int, os.environ.get('DIE', '-1:0').split(':'))
    if rank == state.process_index:
        encode, left = quant._encode_one, [at]
        def deadly(*args):
            left[0] -= 1
            if left[0] < 0: os.kill(os.getpid(), signal.SIGKILL)
            return encode(*args)
        quant._encode_one = deadly
    if task == 'encode': model = encoded(out/'layers' if state.is_main_process else None, ldm4.Spread(state))
    else:
        walks, model = teacher()
        ldm4.distill_ranks(model, walks, TUNE, show=False)
    torch.save(model.state_dict(), out/f'rank{state.process_index}.pt')


def launch(task, out, processes=2, die=None):
    env = dict(os.environ, OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='', PYTHONPATH=os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get('PYTHONPATH', '')]))
    if die: env['DIE'] = die
    how = ['--multi_gpu', '--num_processes', str(processes), '--num_machines', '1', '--mixed_precision', 'no', '--dynamo_backend', 'no', '--main_process_port', '0']
    return subprocess.run([sys.executable, '-m', 'accelerate.commands.launch', *how, __file__, task, str(out)], env=env, capture_output=True, text=True, timeout=280)


def saved(out): return [torch.load(f, weights_only=True) for f in sorted(Path(out).glob('rank*.pt'))]


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


def test_distillation_in_two_processes_averages_gradients(tmp_path):
    done = launch('tune', tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = saved(tmp_path)
    same(one, two)
    walks, by_hand = teacher() # one process that takes both batches, one after the other
    before = {k: v.clone() for k, v in by_hand.state_dict().items()}
    seeds = [TUNE.seed, TUNE.seed + 1_000_003]

    def both(run):
        from aquatic_nb.semi_pv import distillation_loss, iid_batch
        params = [p for g in run.optimizer.param_groups for p in g['params'] if p.grad is not None]
        mine = [p.grad.clone() for p in params]
        run.optimizer.zero_grad(set_to_none=True)
        distillation_loss(run.student, iid_batch(run.teacher, run.step, TUNE.batch, seeds[1])).backward()
        for p, g in zip(params, mine): p.grad.copy_((p.grad + g)/2)
        return {}

    distill(by_hand, walks, TUNE, watch=both, show=False)
    assert any(not torch.equal(before[k], v) for k, v in by_hand.state_dict().items())
    for k, v in by_hand.state_dict().items(): torch.testing.assert_close(one[k].float(), v.float(), rtol=1e-4, atol=1e-5, msg=k)


def test_one_process_needs_no_launcher():
    lonely = SimpleNamespace(num_processes=1, process_index=0, is_main_process=True)
    same(encoded(spread=ldm4.Spread(lonely)).state_dict(), encoded().state_dict())


def test_an_error_names_rank_and_layer(monkeypatch):
    lonely = SimpleNamespace(num_processes=1, process_index=0, is_main_process=True)
    with pytest.raises(RuntimeError, match="rank 0, layer 'b': out of luck"): list(ldm4.Spread(lonely)(lambda n: n if n == 'a' else 1/0 if n == 'c' else exec("raise ValueError('out of luck')"), ['a', 'b', 'c']))


@pytest.mark.parametrize('config, message', [(TuneConfig(minutes=1), 'expected steps'), (TuneConfig(steps=2, selector='random'), "selector='random'")])
def test_what_processes_cannot_agree_on_is_refused(config, message):
    with pytest.raises(ValueError, match=message): ldm4.distill_ranks(None, None, config)


if __name__ == '__main__': main(*sys.argv[1:])
