"The optimizer: codes that move where they should, selectors, roles, what is kept and what is refused."
import copy

import aquatic_nb # noqa: F401  first: diffusers imports torchvision
import pytest
import torch
from torch import nn

from aquatic_nb.aq import Scheme
from aquatic_nb.encode import encode_rows, to_aq
from aquatic_nb.layers import from_aq, packed_layers
from aquatic_nb.semi_pv import SeMIPV, nearest_codes, param_groups
from aquatic_nb.tune.distill import TuneConfig, Tuner, walk_batch
from aquatic_nb.tune.layers import close_layers, open_layers, opened_layers
from tuned_models import QUIET, SETUP, conditional, packed_copy, teacher_of, tuned


@pytest.fixture(scope='module')
def unet(): return conditional()

@pytest.fixture(scope='module')
def packed(unet): return packed_copy(unet)

@pytest.fixture(scope='module')
def teacher(unet): return teacher_of(unet)


def tuner(packed, teacher, steps=10, **kw):
    run = Tuner(copy.deepcopy(packed), teacher, TuneConfig(**(SETUP | dict(steps=steps) | kw)), run=QUIET)
    return run

def nothing(run): return {}

def packed_linear(seed=0, scheme=Scheme(2, 5, 8)):
    "A packed layer, and what its inputs are mixed by."
    gen = torch.Generator().manual_seed(seed)
    mix = torch.randn(72, 72, generator=gen)/72**.5 + torch.eye(72)
    lin = nn.Linear(72, 48)
    lin.weight.data = torch.randn(48, 72, generator=gen)/72**.5
    return from_aq(lin, to_aq(encode_rows(lin.weight.data, mix @ mix.T, scheme), lin.weight.shape)), mix, gen


@pytest.mark.parametrize('scheme', [Scheme(2, 5, 8), Scheme(1, 4, 1, kind='uniform')])
def test_spoiled_codes_move_back(scheme):
    "One group in fifty gets codes at random; the loss of the layer's output alone brings them back."
    right, mix, gen = packed_linear(scheme=scheme)
    box = open_layers(nn.Sequential(copy.deepcopy(right)))
    layer, K = box[0], scheme.n_codewords
    codes = layer.codes.clone()
    bad = torch.rand(codes.shape[:2], generator=gen) < .02
    if scheme.kind == 'uniform': layer.codes[bad] = (codes[bad] + 1).clamp(max=K - 1)
    else: layer.codes[bad] = torch.randint(0, K, (int(bad.sum()), scheme.n_codebooks), generator=gen).int()
    layer.decode()
    wrong = (layer.codes != codes).any(-1)
    opt = SeMIPV(param_groups(box, lr=0., code_lr=.5, code_betas=(.95, .95)), opened_layers(box))
    losses = []
    for _ in range(400):
        x = torch.randn(64, 72, generator=gen) @ mix.T
        loss = (box(x) - right(x).detach()).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert wrong.sum() >= 5
    still = (layer.codes != codes).any(-1)
    assert still.sum() <= .2*wrong.sum() and sum(losses[-10:]) < .2*sum(losses[:10])
    kind = 'integer' if scheme.kind == 'uniform' else 'additive'
    assert opt.moved[kind] >= (wrong & ~still).sum() and not opt.moved['additive' if kind == 'integer' else 'integer']


def test_right_codes_stay():
    "Where nothing can be gained nothing moves, however long the gradient's noise is listened to."
    right, mix, gen = packed_linear()
    box = open_layers(nn.Sequential(copy.deepcopy(right)))
    opt = SeMIPV(param_groups(box, lr=0., code_lr=.5), opened_layers(box))
    codes = box[0].codes.clone()
    for _ in range(100):
        x = torch.randn(64, 72, generator=gen) @ mix.T
        noise = .1*torch.randn(64, 48, generator=gen)
        opt.zero_grad()
        (box(x) - right(x).detach() - noise).square().mean().backward()
        opt.step()
    assert (box[0].codes != codes).any(-1).float().mean() < .01


def test_invalidate_touches_what_it_names(packed, teacher):
    run = tuner(packed, teacher, mode='walk')
    for _ in range(3): run.train_step(nothing)
    opt = run.optimizer
    group = {g['role']: g for g in opt.param_groups}
    v = [opt.state[p]['v'].clone() for p in group['codebooks']['params']]
    dense = [opt.state[p]['m'].clone() for p in group['dense']['params'] if 'm' in opt.state[p]]
    assert opt.invalidate('A', roles=('codebooks',)) == 1
    assert all(not opt.state[p]['m'].any() and not opt.state[p]['n_m'].any() for p in group['codebooks']['params'])
    assert all(torch.equal(a, opt.state[p]['v']) for a, p in zip(v, group['codebooks']['params']))
    assert all(torch.equal(a, opt.state[p]['m']) for a, p in zip(dense, [p for p in group['dense']['params'] if 'm' in opt.state[p]]))
    opt.invalidate('A', roles=('dense',), moments=('m', 'v'))
    assert all(not opt.state[p]['v'].any() for p in group['dense']['params'] if opt.state[p])
    assert opt.invalidate('A', roles=('codes',)) == 1 and not any(opt.state[p]['m'].any() for p in group['codes']['params'])
    with pytest.raises(ValueError, match="'Z'"): opt.invalidate('Z')
    with pytest.raises(ValueError, match="'w'"): opt.invalidate('A', moments=('w',))
    with pytest.raises(ValueError, match='weights'): SeMIPV(param_groups(run.student), run.layers, roles=('weights',))
    with pytest.raises(ValueError, match='weights'): param_groups(run.student, lrs=dict(weights=1.))


def test_groups_that_jump_begin_anew_and_selector_b_hits_their_codewords(packed, teacher):
    run = tuner(packed, teacher, steps=60, code_every=30, code_fraction=.2, warmup=1, lr=1e-6)
    for _ in range(30): run.train_step(nothing)
    opt, hits = run.optimizer, 0
    for layer in run.layers.values():
        if id(layer) not in opt.jumps: continue
        jump, st = opt.jumps[id(layer)], opt.state[layer.weight]
        assert not st['m'][jump.groups].any() and not st['n_m'][jump.groups].any() and st['n_m'][~jump.groups].all()
        hits += int(jump.groups.sum())
    assert hits == opt.changed['additive'] == opt.moved['additive'] > 20
    assert 0 < opt.share_moved()['additive'] < 1
    before = {id(o): opt.state[o.codebooks]['n_m'].clone() for o in run.layers.values()}
    opt.invalidate('B')
    for o in run.layers.values():
        lost = (before[id(o)] != opt.state[o.codebooks]['n_m'])[..., 0]
        members = opt.jumps[id(o)].members if id(o) in opt.jumps else torch.zeros_like(lost)
        assert torch.equal(lost, members > opt.membership)


def test_a_jump_stops_at_the_trust_ratio_but_always_admits_one(packed, teacher):
    run = tuner(packed, teacher)
    opt, gen = run.optimizer, torch.Generator().manual_seed(0)
    move = torch.randn(50, 8, generator=gen)
    score = torch.rand(50, generator=gen)*5
    size, clear = move.square().sum(1), score >= opt.clear
    for limit in (1e-6, 20., 1e9):
        taken = opt.admit(move, score, torch.tensor(limit))
        assert taken.dtype == torch.bool and (score[taken] >= opt.clear).all()
        assert score[taken].min() >= score[clear & ~taken].max() if (clear & ~taken).any() else taken.equal(clear)
        last = score.where(taken, torch.tensor(9.)).argmin()
        assert size[taken].sum() - size[last] < limit                             # all but the last are within
    assert int(opt.admit(move, score, torch.tensor(1e-6)).sum()) == 1
    assert not opt.admit(move, 0*score, torch.tensor(1.)).any()


@pytest.mark.parametrize('d,M', [(3, 1), (4, 2), (8, 3)])
def test_nearest_codes_never_get_worse(d, M):
    gen = torch.Generator().manual_seed(d)
    C, target = torch.randn(M, 8, d, generator=gen), torch.randn(64, d, generator=gen)
    old = torch.randint(0, 8, (64, M), generator=gen).int()
    A = torch.randn(d, d, generator=gen)
    for metric in (None, A @ A.T + torch.eye(d)):
        L = torch.eye(d) if metric is None else torch.linalg.cholesky(metric)
        far = lambda c: ((sum(C[m][c[:, m].long()] for m in range(M)) - target) @ L).square().sum(1)
        assert (far(nearest_codes(target, C, old, metric=metric)) <= far(old)*(1 + 1e-4) + 1e-5).all()


def test_frozen_codes_stay(packed, teacher):
    model, log = tuned(packed, teacher, code_lr=0.)
    for a, b in zip(packed_layers(model).values(), packed_layers(packed).values()):
        assert torch.equal(a.aq.codes, b.aq.codes) and not torch.equal(a.aq.scales, b.aq.scales)
    assert not sum(r['additive'] + r['integer'] for r in log[:-1])


def test_works_under_accelerate(packed, teacher):
    from accelerate import Accelerator
    model = open_layers(copy.deepcopy(packed))
    layers = opened_layers(model)
    optimizer = SeMIPV(param_groups(model), layers, selector='B', code_every=1, code_fraction=.1)
    accelerator = Accelerator(cpu=True)
    model, prepared = accelerator.prepare(model, optimizer)
    call = walk_batch(teacher, 0, 4, 0).calls[0]
    losses = []
    for _ in range(6):
        loss = (model(**{k: v.float() if v.dtype == torch.float16 else v for k, v in call.items()}).sample - call.out.float()).square().mean()
        prepared.zero_grad()
        accelerator.backward(loss)
        prepared.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    state = copy.deepcopy(prepared.state_dict())
    prepared.load_state_dict(state)
    assert optimizer.steps == 6
    close_layers(model)
    assert len(packed_layers(model)) == len(layers) and isinstance(model, nn.Module)
