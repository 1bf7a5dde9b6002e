"One pass keeps what all layers see, and one helper stands behind a walk: nothing else may change."
import math

import pytest
import torch
from torch import nn

from aquatic_nb.calib import InputStore, input_moments
from aquatic_nb.core import Run
from aquatic_nb.walk import as_calls, helped, record_inputs

QUIET = Run(progress=False)

def layers():
    conv = nn.Conv2d
    return dict(plain=conv(3, 5, 3, padding=1), strided=conv(3, 4, 3, stride=2, padding=1), wide=conv(3, 4, 5, padding=2),
                dilated=conv(3, 4, 3, padding=2, dilation=2), reflected=conv(3, 4, 3, padding=1, padding_mode='reflect'),
                circular=conv(3, 4, 3, padding=1, padding_mode='circular'), grouped=conv(4, 4, 3, padding=1, groups=2),
                point=conv(3, 4, 1), oblong=conv(3, 4, (3, 1), padding=(1, 0), stride=(1, 2)), sound=nn.Conv1d(3, 4, 3, padding=1),
                space=nn.Conv3d(2, 3, 3, padding=1), back=nn.ConvTranspose2d(3, 4, 4, stride=2, padding=1), linear=nn.Linear(6, 4))

SHAPES = dict(sound=(2, 3, 19), space=(2, 2, 4, 5, 6), linear=(2, 7, 6), grouped=(2, 4, 9, 11))

class One(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer
    def forward(self, x): return self.layer(x)

@pytest.mark.parametrize('kind', list(layers()))
def test_everything_kept_gives_the_moments_of_a_pass(kind, tmp_path):
    torch.manual_seed(0)
    model = One(layers()[kind]).eval()
    given = [dict(x=torch.randn(SHAPES.get(kind, (2, 3, 16, 8))).bfloat16().float()) for _ in range(3)] # no rounding left
    exact = input_moments(model, given, ['layer'], rows_per_input=10**4)['layer']
    for folder in (None, tmp_path):
        found = InputStore(model, given, ['layer'], folder, 10**4, QUIET).moments(['layer'])['layer']
        if SHAPES.get(kind) is None or kind == 'linear': assert found.rows == exact.rows
        if found.rows != exact.rows: continue # squares that overlap at the far border count some places twice
        torch.testing.assert_close(found.H, exact.H, rtol=1e-4, atol=1e-4)
        assert torch.equal(found.H, found.H.T) or (found.H - found.H.T).abs().max() < 1e-6
        if exact.mean is not None: torch.testing.assert_close(found.mean, exact.mean, rtol=1e-4, atol=1e-5)
    assert torch.linalg.eigvalsh(found.H.double()).min() > -1e-5*found.H.diagonal().max()

@pytest.mark.parametrize('size', [(9, 11), (8, 8), (5, 3), (17, 8)])
def test_a_sample_is_unbiased_enough_and_bounded(size):
    torch.manual_seed(1)
    model, given = One(nn.Conv2d(64, 4, 3, padding=1)).eval(), [dict(x=torch.randn(40, 64, *size)) for _ in range(4)]
    found = InputStore(model, given, ['layer'], None, 2, QUIET).moments(['layer'])['layer']
    limit = max(4096, 2*576)
    assert found.rows <= limit*1.2 + 4*64 and found.rows >= min(limit, 160*math.prod(size))*.95
    exact = input_moments(model, given, ['layer'], rows_per_input=10**4)['layer']
    assert (found.H - exact.H).norm()/exact.H.norm() < .6
    assert abs(found.H.trace()/exact.H.trace() - 1) < .1

def test_threads_folders_and_damage_change_no_byte(tmp_path):
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, stride=2)).eval()
    given, names = as_calls(model, [dict(input=torch.randn(4, 3, 20, 20)) for _ in range(5)]), ['0', '2']
    one = InputStore(model, given, names, None, 2, Run(workers=1, progress=False)).moments(names)
    first = InputStore(model, given, names, tmp_path, 2, Run(workers=2, progress=False)).moments(names)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 5
    files[1].write_bytes(files[1].read_bytes()[:100]) # as a full disk leaves it
    files[3].unlink()
    calls = []
    hook = model[0].register_forward_hook(lambda *o: calls.append(1))
    again = InputStore(model, given, names, tmp_path, 2, QUIET).moments(names)
    hook.remove()
    assert len(calls) == 2 # only what was missing
    for n in names:
        assert torch.equal(one[n].H, first[n].H) and torch.equal(one[n].H, again[n].H)
        assert torch.equal(one[n].mean, again[n].mean)

def test_layers_that_share_an_input_share_moments_and_idle_ones_are_left_out():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.idle = nn.Linear(5, 3), nn.Linear(5, 4), nn.Linear(5, 2)
        def forward(self, x): return self.q(x).sum(-1) + self.k(x).sum(-1)
    found = InputStore(Net(), [dict(x=torch.randn(6, 5))], ['q', 'k', 'idle'], run=QUIET).moments(['q', 'k', 'idle'])
    assert found['q'] is found['k'] and 'idle' not in found

class Net(nn.Module):
    "Answers in the form that is asked for; counts its rows."
    def __init__(self, form):
        super().__init__()
        self.form, self.layer, self.rows = form, nn.Linear(4, 4), 0
    def forward(self, sample, timestep=None, extra=None):
        self.rows += len(sample)
        out = self.layer(sample) + 0*(0 if extra is None else extra['bias'])
        return dict(tensor=out, tuple=(out,), two=(out, out + 1), dict={'sample': out})[self.form]

@pytest.mark.parametrize('form', ['tensor', 'tuple', 'two', 'dict'])
def test_help_changes_no_answer(form, tmp_path):
    torch.manual_seed(3)
    model, x, extra = Net(form), torch.randn(7, 4), dict(bias=torch.randn(4))
    first = lambda out: out if torch.is_tensor(out) else out['sample'] if isinstance(out, dict) else out[0]
    with torch.no_grad():
        plain = first(model(x, 3, extra=extra))
        for how in (dict(), dict(rows=2), dict(rows=3, workers=2), dict(folder=tmp_path), dict(folder=tmp_path, rows=2)):
            with helped(model, **how): out = model(x, 3, extra=extra)
            assert type(out) is type(model(x)) and (len(out) == 2 if form == 'two' else True)
            torch.testing.assert_close(first(out), plain)
        model.rows = 0
        with helped(model, tmp_path): model(x, 3, extra=extra)
        assert model.rows == (7 if form == 'two' else 1) # kept: one row tells the form
        with helped(model, tmp_path): model(x + 1, 3, extra=extra)
        assert model.rows >= 8 # other inputs are computed
    assert 'forward' not in vars(model)

def test_help_leaves_gradients_hooks_and_forwards_of_others_alone(tmp_path):
    model, x = Net('tensor'), torch.randn(4, 4, requires_grad=True)
    own = model.forward
    model.forward = lambda *a, **k: own(*a, **k)*2
    mine = model.forward
    with helped(model, tmp_path, rows=1):
        model(x).sum().backward()
        recorded = record_inputs(model, lambda: model(x.detach()))
    assert model.forward is mine and x.grad is not None and model.layer.weight.grad is not None
    assert recorded[0].out.shape == (4, 4)
    with pytest.raises(RuntimeError), helped(model): raise RuntimeError
    assert model.forward is mine

def test_a_kept_answer_that_is_damaged_is_computed_again(tmp_path):
    model, x = Net('tensor'), torch.randn(3, 4)
    with torch.no_grad():
        with helped(model, tmp_path): plain = model(x)
        file, = tmp_path.iterdir()
        for broken in (b'', b'{}', file.read_bytes()[:-3]):
            file.write_bytes(broken)
            with helped(model, tmp_path): assert torch.equal(model(x), plain)

def tiny():
    from diffusers import UNet2DModel
    torch.manual_seed(0)
    return UNet2DModel(sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4,
                       down_block_types=('DownBlock2D', 'AttnDownBlock2D'), up_block_types=('AttnUpBlock2D', 'UpBlock2D'), attention_head_dim=4).eval()

def test_one_pass_runs_are_the_same_bytes_however_they_go(tmp_path, monkeypatch):
    "Threads, a folder, and a kill in the walk and in the pass: the packed model is the same."
    import aquatic_nb.quant as quant
    monkeypatch.setattr(quant, '_LARGE', 1000)
    how = dict(bits=7, laq=False, n_calibration=8, sweeps=1, beam=2, progress=False)
    state = lambda m: {k: v.clone() for k, v in m.state_dict().items()}
    plain = state(quant.quantize(tiny(), workers=1, **how))
    for kill_at in (7, 25):
        model, folder, seen = tiny(), tmp_path/str(kill_at), []
        def count(*args):
            seen.append(1)
            if len(seen) == kill_at: raise KeyboardInterrupt
        hook = model.conv_in.register_forward_pre_hook(count)
        with pytest.raises(KeyboardInterrupt): quant.quantize(model, workers=2, work_dir=folder, **how)
        hook.remove()
        again, calls = tiny(), []
        again.conv_in.register_forward_hook(lambda *o: calls.append(1))
        found = state(quant.quantize(again, workers=2, work_dir=folder, **how))
        assert found.keys() == plain.keys() and all(torch.equal(found[k], plain[k]) for k in plain)
        assert not (folder/'inputs').exists() # as large as the model, and of no use any more
        stages = [line.split(',')[0] for line in (folder/'times.csv').read_text().splitlines()]
        assert stages[-3:] == ['inputs', 'plan', 'codes'] and stages[0] == 'stage'
