"Tuning: exact resume, selectors, roles, what is kept and what is refused."
import copy
import math

import aquatic_nb.core # noqa: F401  first: diffusers imports torchvision
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import nn

from aquatic_nb.act import attach_act, checkpoint_with_timestep
from aquatic_nb.aq import Scheme, check_values
from aquatic_nb.encode import encode
from aquatic_nb.kaq import natural_group_size, packable
from aquatic_nb.layers import from_aq, packed_layers, swap
from aquatic_nb.semi_pv import (SeMIPV, Teacher, TuneConfig, Tuner, UniformTuned, close_layers, close_peer, distill, held_out_loss, nearest_codes, open_layers,
                                param_groups, straight_through, walk_batch)

CLASSES = torch.randn(5, 1, 16, generator=torch.Generator().manual_seed(3))


def draw(n, gen):
    return dict(encoder_hidden_states=CLASSES[torch.randint(4, (n,), generator=gen)]), dict(encoder_hidden_states=CLASSES[4:].expand(n, -1, -1))


def scheduler(): return DDIMScheduler(beta_schedule='scaled_linear', beta_start=.0015, beta_end=.0195, clip_sample=False)


@pytest.fixture(scope='module')
def unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(sample_size=4, in_channels=2, out_channels=2, down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D'),
                                up_block_types=('CrossAttnUpBlock2D', 'UpBlock2D'), block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
                                cross_attention_dim=16, attention_head_dim=1).eval().requires_grad_(False)


@pytest.fixture(scope='module')
def packed(unet):
    model = copy.deepcopy(unet)
    for n, m in packable(model).items(): swap(model, n, from_aq(m, encode(m.weight.detach(), None, Scheme(2, 3, natural_group_size(m.weight.shape)), sweeps=1)))
    return model


@pytest.fixture(scope='module')
def teacher(unet): return Teacher(unet, scheduler(), draw, n_walks=3, batch=8, steps=5)


def tune(packed, teacher, **kw):
    model = copy.deepcopy(packed)
    extra = {k: kw.pop(k) for k in ('checkpoint', 'every_minutes', 'held', 'watch') if k in kw}
    log = distill(model, teacher, TuneConfig(**dict(steps=12, batch=4, code_every=2, code_fraction=.1, code_lr=.2, trust_ratio=.9, warmup=2) | kw), show=False, **extra)
    return model, log


def same(a, b): return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


@pytest.mark.parametrize('selector', [None, 'A', 'B', 'C', 'random'])
def test_learns_and_stays_storable(packed, teacher, unet, selector):
    held = Teacher(unet, scheduler(), draw, n_walks=1, batch=8, steps=5, seed=9)
    before = held_out_loss(packed, held)
    model, log = tune(packed, teacher, selector=selector, mode='walk', steps=40, held=held, code_lr=3e-2)
    assert log[-1]['held'] < before and not any(p.requires_grad for p in model.parameters())
    layers = packed_layers(model)
    assert list(layers) == list(packed_layers(packed))
    for n, m in layers.items(): check_values(m.aq, n)
    kept = log[-1]['averaged'] if log[-1]['kept'] == 'averaged' else log[-1]['held']
    assert held_out_loss(model, held) == pytest.approx(kept, rel=1e-4)      # what was measured is what is stored


@pytest.mark.parametrize('kw', [dict(mode='walk', selector='A'), dict(mode='iid', selector='B', bf16_state=True), dict(code_betas=(.9, .95), selector='C')])
def test_killed_run_resumes_to_the_same_weights(packed, teacher, tmp_path, monkeypatch, kw):
    whole, log = tune(packed, teacher, **kw)
    assert max(r['changed'] for r in log[:-1]) > 0

    class Killed(Exception): ...
    def die(run):
        if run.step == 7: raise Killed
        return {}
    path = tmp_path/'run.pt'
    with pytest.raises(Killed): tune(packed, teacher, checkpoint=path, every_minutes=0, watch=die, **kw)
    assert path.exists()
    resumed, log = tune(packed, teacher, checkpoint=path, **kw)
    assert len(log) == 13 and same(whole, resumed)


def test_frozen_codes_stay(packed, teacher):
    model, _ = tune(packed, teacher, code_lr=0.)
    for a, b in zip(packed_layers(model).values(), packed_layers(packed).values()):
        assert torch.equal(a.aq.codes, b.aq.codes)
        assert a.scheme.kind == 'uniform' or not torch.equal(a.aq.scales, b.aq.scales)


def test_activation_ranges_are_trained(packed, teacher):
    model = copy.deepcopy(packed)
    b = walk_batch(teacher, 0, 4, 0)
    attach_act(model, 8, [dict(sample=b['x'], timestep=b['t'], **b['cond'])])
    before = {n: m.act.scale.clone() for n, m in packed_layers(model).items()}
    tuned, _ = tune(model, teacher)
    assert sum(not torch.equal(m.act.scale, before[n]) for n, m in packed_layers(tuned).items()) > len(before)//2
    assert all((m.act.scale > 0).all() for m in packed_layers(tuned).values())


def test_a_peer_with_activations(unet, teacher):
    "The straight-through peer trains its activation ranges too, and closing it changes nothing."
    model = straight_through(copy.deepcopy(unet), bits=4)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, UniformTuned)}
    b = walk_batch(teacher, 0, 4, 0)
    attach_act(model, 8, [dict(sample=b['x'], timestep=b['t'], **b['cond'])], layers={n: m for n, m in layers.items() if n != 'conv_in'})
    assert layers['conv_in'].act is None and layers['conv_out'].act is not None
    before = {n: m.act.scale.clone() for n, m in layers.items() if m.act is not None}
    run = Tuner(model, teacher, TuneConfig(steps=5, batch=4, code_lr=0.))
    assert {g['role'] for g in run.optimizer.param_groups} == {'scales', 'dense', 'act'}
    for _ in range(5): run.train_step()
    assert sum(not torch.equal(layers[n].act.scale, s) for n, s in before.items()) > len(before)//2
    call = dict(sample=b['x'], timestep=b['t'], **b['cond'])
    with torch.no_grad():
        open_, _ = model(**call).sample, close_peer(model)
        assert not any(isinstance(m, UniformTuned) for m in model.modules())
        assert torch.allclose(model(**call).sample, open_, atol=1e-5)


def test_checkpointing_keeps_the_timestep(packed, teacher):
    model = copy.deepcopy(packed)
    batches = [walk_batch(teacher, j, 4, 0) for j in range(5)]
    calls = [dict(sample=b['x'], timestep=b['t'], **b['cond']) for b in batches]
    attach_act(model, 8, calls)
    open_layers(model)
    grads = []
    for on in (False, True):
        if on: model.enable_gradient_checkpointing(checkpoint_with_timestep)
        model.train().zero_grad()
        model.conv_in.bias.requires_grad_(True)
        model(**calls[2]).sample.square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) and all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads))


def test_invalidate_touches_what_it_names(packed, teacher):
    run = Tuner(copy.deepcopy(packed), teacher, TuneConfig(steps=10, batch=4, mode='walk'))
    for _ in range(3): run.train_step()
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
    with pytest.raises(ValueError, match="'Z'"): opt.invalidate('Z')
    with pytest.raises(ValueError, match="'w'"): opt.invalidate('A', moments=('w',))
    with pytest.raises(ValueError, match='weights'): SeMIPV(param_groups(run.student), run.layers, roles=('weights',))


def test_selector_b_hits_only_groups_that_jumped(packed, teacher):
    run = Tuner(copy.deepcopy(packed), teacher, TuneConfig(steps=10, batch=4, code_betas=(.9, .95), code_every=4, code_fraction=.1, code_lr=.5, trust_ratio=.9, warmup=1))
    for _ in range(4): run.train_step()
    opt, hits = run.optimizer, 0
    for layer in run.layers.values():
        st = opt.state[layer.weight]
        before = st['m'].clone()
        if not layer.changed.any(): continue
        hits += 1
        opt.invalidate('B', roles=('codes',))
        assert not st['m'][layer.changed].any() and torch.equal(st['m'][~layer.changed], before[~layer.changed])
    assert hits > 3


def test_jump_respects_the_trust_ratio_and_moves_nearer(packed, teacher):
    run = Tuner(copy.deepcopy(packed), teacher, TuneConfig(steps=10, batch=4))
    opt = run.optimizer
    for layer in run.layers.values():
        O, J, _ = layer.codes.shape
        before = layer.weight.detach().clone()
        gen = torch.Generator().manual_seed(0)
        delta = torch.randn(O, J, layer.scheme.group_size, generator=gen)*before.square().mean().sqrt()
        asked, wanted = delta.clone(), delta.square().sum()
        opt.code_fraction, opt.trust_ratio = .5, .15
        n, changed, moved = opt.jump(layer, delta)
        layer.decode()
        assert n == int(changed.sum()) and (layer.weight - before).norm() <= .1501*before.norm()
        assert delta.square().sum() <= wanted and torch.equal(asked[~changed], delta[~changed])


@pytest.mark.parametrize('d,M', [(3, 1), (4, 2), (8, 3)])
def test_nearest_codes_never_get_worse(d, M):
    gen = torch.Generator().manual_seed(d)
    C, target = torch.randn(M, 8, d, generator=gen), torch.randn(64, d, generator=gen)
    old = torch.randint(0, 8, (64, M), generator=gen).int()
    far = lambda c: (sum(C[m][c[:, m].long()] for m in range(M)) - target).square().sum(1)
    assert (far(nearest_codes(target, C, old)) <= far(old) + 1e-5).all()


def test_nonfinite_loss_names_step_and_layer_and_keeps_the_checkpoint(packed, teacher, tmp_path):
    path = tmp_path/'run.pt'
    def spoil(run):
        if run.step == 3: run.student.mid_block.resnets[0].conv1.scales.data[0] = math.nan
        return {}
    with pytest.raises(FloatingPointError, match=r'step 4.*mid_block\.resnets\.0\.conv1'): tune(packed, teacher, checkpoint=path, every_minutes=0, watch=spoil)
    assert torch.load(path, weights_only=True)['step'] <= 4


def test_teacher_cache(unet, teacher, tmp_path):
    kw = dict(n_walks=3, batch=8, steps=5)
    disk = Teacher(unet, scheduler(), draw, folder=tmp_path, **kw)
    for k in ('x', 'cond_out', 'null_out', 't'): assert torch.equal(disk.walk(1)[k], teacher.walk(1)[k])
    again = Teacher(unet, scheduler(), draw, folder=tmp_path, **kw)
    again.make = None                                             # read, not made
    assert torch.equal(again.walk(1)['x'], teacher.walk(1)['x'])
    with pytest.raises(ValueError, match='other settings'): Teacher(unet, scheduler(), draw, folder=tmp_path, **dict(kw, eta=1.)).walk(1)
    streamed = Teacher(unet, scheduler(), draw, limit_mb=0, **kw)
    assert torch.equal(streamed.walk(1)['x'], teacher.walk(1)['x']) and not streamed.kept
    noisy = Teacher(unet, scheduler(), draw, **dict(kw, eta=1.))
    assert torch.equal(noisy.walk(0)['x'][0], teacher.walk(0)['x'][0]) is not None and torch.isfinite(noisy.walk(0)['x'].float()).all()


def test_full_disk_is_named(unet, tmp_path):
    blocked = tmp_path/'file'
    blocked.write_text('not a folder')
    with pytest.raises(OSError, match='file'): Teacher(unet, scheduler(), draw, n_walks=1, batch=2, steps=2, folder=blocked/'cache').walk(0)


def test_teacher_of_another_shape_is_refused(packed, teacher):
    other = UNet2DConditionModel(sample_size=4, in_channels=3, out_channels=3, down_block_types=('DownBlock2D',), up_block_types=('UpBlock2D',),
                                 block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, cross_attention_dim=16)
    with pytest.raises(ValueError, match='student'): distill(copy.deepcopy(packed), Teacher(other, scheduler(), draw, 1, 4, 2), TuneConfig(steps=2), show=False)
    with pytest.raises(ValueError, match='no packed layers'): distill(copy.deepcopy(teacher.model), teacher, TuneConfig(steps=2), show=False)
    with pytest.raises(ValueError, match='steps'): TuneConfig()


def test_works_under_accelerate(packed, teacher):
    from accelerate import Accelerator
    model = copy.deepcopy(packed)
    layers = open_layers(model)
    optimizer = SeMIPV(param_groups(model, code_lr=3e-2), layers, selector='B', code_every=1, code_fraction=.1)
    accelerator = Accelerator(cpu=True)
    model, prepared = accelerator.prepare(model, optimizer)
    b = walk_batch(teacher, 0, 4, 0)
    losses = []
    for _ in range(6):
        loss = (model(b['x'], b['t'], **b['cond']).sample - b['cond_out']).square().mean()
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
