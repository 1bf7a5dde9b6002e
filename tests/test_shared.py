"Codebooks that several layers hold together: learned, allocated, encoded, stored, loaded and tuned as one."
import copy, os

import aquatic_nb # noqa: F401  first: torchvision may lack its operators
import pandas as pd
import pytest
import torch

from aquatic_nb.aq import Scheme, codebook_bytes, stored_bytes
from aquatic_nb.encode import encode_rows, share_codebooks
from aquatic_nb.calib import calibration_batches
from aquatic_nb.hub import attach, load_quantized, save_quantized
from aquatic_nb.kaq import natural_group_size, packable
from aquatic_nb.knapsack import allocate, bits_to_bytes, price
from aquatic_nb.laq import SHARED_ANCHORS, sensitivity
from aquatic_nb.layers import packed_layers, stored_sizes
from aquatic_nb.menu import effective_bits, menu, share_sets, shared_menu
from aquatic_nb.core import Run
from aquatic_nb.pack import WorkDir, encode_model, pack, quant_report
from aquatic_nb.quant import quantize_unet
from aquatic_nb.semi_pv import SeMIPV, param_groups
from aquatic_nb.tune.layers import close_layers, open_layers, opened_layers
from packed_models import conditional

@pytest.fixture(scope='module')
def dense(): return conditional()

@pytest.fixture(scope='module')
def batches(dense): return calibration_batches(dense, 'auto', n=4, steps=3)

def schemes_of(dense):
    "Every set shares two books of 8; the other layers have their own."
    out = {n: Scheme(2, 3, natural_group_size(m.weight.shape)) for n, m in packable(dense).items()}
    for (kind, d), names in share_sets(packable(dense)).items(): out |= {n: Scheme(2, 3, d, share=kind) for n in names}
    return out

def packed(dense, batches, **kw):
    model, schemes = copy.deepcopy(dense), schemes_of(dense)
    pack(model, encode_model(model, schemes, batches, dict(beam=2, sweeps=1), run=Run(progress=False), **kw))
    return model, schemes

@pytest.fixture(scope='module')
def model(dense, batches): return packed(dense, batches)

def test_learning_lowers_the_summed_loss():
    gen = torch.Generator().manual_seed(0)
    problems = []
    for o, n in ((12, 40), (20, 24), (8, 33)):                       # a fan-in that d does not divide, too
        X = torch.randn(3*n, n, generator=gen)
        problems.append((torch.randn(o, n, generator=gen), X.T @ X/len(X), float(torch.rand((), generator=gen)) + .1))
    scheme = Scheme(2, 4, 8)
    def loss(C): return sum(w*encode_rows(W, H, scheme, sweeps=1, codebooks=C).loss() for W, H, w in problems)
    losses = [loss(share_codebooks(problems, scheme, sweeps=k)) for k in (0, 1, 4)]
    assert losses[1] < losses[0] and losses[2] < losses[0]
    C = share_codebooks(problems, scheme)
    assert torch.equal(C, C.round()) and C.abs().amax(1).sum(0).max() <= 127 and torch.equal(C, share_codebooks(problems, scheme))
    zero = [(torch.zeros(4, 16), None, 1.), (torch.zeros(2, 16), torch.zeros(16, 16), 1.)]
    assert torch.isfinite(share_codebooks(zero, scheme)).all()

def test_the_table_does_not_depend_on_threads(dense, batches):
    "What is shared is learned with weights from this table: its last bits reach the file."
    before, found = torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            found.append(sensitivity(dense, batches, cheap=True, workers=n, progress=False))
    finally: torch.set_num_threads(before)
    assert found[0].equals(found[1])

def test_one_parameter_counted_once(model, dense):
    unet, schemes = model
    sets = {}
    for n, layer in packed_layers(unet).items(): sets.setdefault(schemes[n].share or n, set()).add(id(layer.codebooks))
    assert all(len(ids) == 1 for ids in sets.values()) and len(sets) < len(schemes)
    report = quant_report(unet)
    unique = {id(p): p.nbytes for m in packed_layers(unet).values() for k in m._stored if (p := getattr(m, k)) is not None}
    assert report.attrs['weight_bytes'] == sum(unique.values()) == sum(stored_sizes(unet).values())

def test_saved_once_and_loaded_equal(model, tmp_path):
    unet = attach(copy.deepcopy(model[0]), bits=3)
    save_quantized(unet, tmp_path/'m')
    again = load_quantized(tmp_path/'m')
    for (n, a), (_, b) in zip(packed_layers(unet).items(), packed_layers(again).items()): assert torch.equal(a.weight, b.weight), n
    assert quant_report(again).attrs['weight_bytes'] == quant_report(unet).attrs['weight_bytes']
    apart = copy.deepcopy(model[0])
    for layer in packed_layers(apart).values(): layer.codebooks = torch.nn.Parameter(layer.codebooks.detach().clone(), requires_grad=False)
    save_quantized(attach(apart, bits=3), tmp_path/'apart')
    size = lambda f: os.path.getsize(tmp_path/f/'diffusion_pytorch_model.safetensors')
    doubled = quant_report(apart).attrs['weight_bytes'] - quant_report(unet).attrs['weight_bytes']
    assert size('apart') - size('m') >= doubled > 0

def test_resumes_with_the_same_codebooks(dense, batches, model, tmp_path):
    first, _ = packed(dense, batches, work=WorkDir(tmp_path/'w', 'mark'))
    files = sorted((tmp_path/'w').glob('*.safetensors'))
    for f in files[::2]: f.unlink()                                  # some layers, and perhaps the codebooks, have to be made again
    (tmp_path/'w'/'shared.safetensors').write_bytes(b'damaged')
    second, _ = packed(dense, batches, work=WorkDir(tmp_path/'w', 'mark'))
    for (n, a), b, c in zip(first.state_dict().items(), second.state_dict().values(), model[0].state_dict().values()): assert torch.equal(a, b) and torch.equal(a, c), n

def test_gradients_add_up_and_stay_one(model):
    unet = open_layers(copy.deepcopy(model[0]))
    layers = {n: m for n, m in opened_layers(unet).items() if len(m.together) > 1}
    first = next(iter(layers.values()))
    for m in first.together: m.weight.grad = torch.randn(m.weight.shape, generator=torch.Generator().manual_seed(1))
    for m in first.together: m.pull_grads()
    books = first.codebooks.detach().clone().requires_grad_()
    total = 0
    for m in first.together:
        rows = sum(books[k][m.codes[..., k].long()] for k in range(2))*m.row_scales()[:, None, None]
        rows = rows.flatten(1)[:, :m.weight[0].numel()]
        total = total + (rows*m.weight.grad.flatten(1)).sum()
    total.backward()
    torch.testing.assert_close(first.codebooks.grad, books.grad, rtol=1e-4, atol=1e-4)
    again = first.codebooks.grad.clone()
    for m in first.together: m.pull_grads()                          # pulled twice is not added twice
    assert torch.equal(first.codebooks.grad, again)

@pytest.mark.parametrize('selector', [None, 'B'])
def test_tuning_keeps_them_together(model, selector):
    unet = copy.deepcopy(model[0])
    before = {n: layer.weight.clone() for n, layer in packed_layers(unet).items()}
    layers = opened_layers(open_layers(unet))
    optimizer = SeMIPV(param_groups(unet, lr=.2, code_lr=.3), layers, selector=selector, code_every=1, code_fraction=.5, trust_ratio=.9)
    seen = [id(p) for g in optimizer.param_groups for p in g['params']]
    assert len(seen) == len(set(seen))
    gen = torch.Generator().manual_seed(0)
    for _ in range(3):
        for m in layers.values(): m.weight.grad = torch.randn(m.weight.shape, generator=gen)
        optimizer.step()
    want = {n: m.weight.clone() for n, m in layers.items()}
    close_layers(unet)
    groups = {}
    for n, layer in packed_layers(unet).items():
        torch.testing.assert_close(layer.weight, want[n], rtol=2e-3, atol=2e-3*float(want[n].abs().max()))
        assert not torch.equal(layer.weight, before[n])
        groups.setdefault(model[1][n].share or n, set()).add(id(layer.codebooks))
    assert all(len(ids) == 1 for ids in groups.values())
    attach(unet, bits=3)

def test_allocation_pays_once_and_resumes(dense, batches, tmp_path):
    keys = dict(progress=False, held_out=1, workers=1)
    names = sum((v for k, v in share_sets(packable(dense)).items()), [])[:9]
    table = sensitivity(dense, batches, names=names, **keys)
    part = sensitivity(dense, batches, names=names, work_dir=tmp_path, **keys)
    file = next(tmp_path.glob('laq_*.csv'))
    lines = file.read_text().splitlines()
    kept = [i for i, o in enumerate(lines) if i == 0 or o.startswith(names[0] + ',')]
    file.write_text('\n'.join(lines[i] for i in kept) + '\n')        # killed after the first layer
    again = sensitivity(dense, batches, names=names, work_dir=tmp_path, **keys)
    for other in (part, again): assert table.option.tolist() == other.option.tolist() and (table.damage - other.damage).abs().max() <= 1e-6*table.damage.max()
    assert table.option.str.contains('@').any()
    # the offer is only as good as its price: where sharing is nearly free, it is taken
    cheap = table.assign(damage=table.damage.where(~table.option.str.contains('@'), 0.))
    budget = bits_to_bytes(table, 9)
    choice = allocate(cheap, budget)
    shared = {o for o in choice.values() if o != 'dense' and o.share}
    assert shared and price(table, choice)[0] <= budget
    own = sum(price(table, {n: o})[0] for n, o in choice.items())
    assert own - price(table, choice)[0] == sum(codebook_bytes(o)*(sum(c == o for c in choice.values()) - 1) for o in shared)
    assert {(o.n_codebooks, o.codebook_bits) for o in shared_menu('self v', 8)} >= set(SHARED_ANCHORS)

def test_sharing_has_to_earn_its_keep():
    "A promise below `share_gain` is not taken; one above it is; and whatever is chosen fits the budget."
    layers = {f'down_blocks.0.attentions.{i}.transformer_blocks.0.attn1.to_q': torch.nn.Linear(64, 64) for i in range(6)}
    rows = [dict(layer=n, kind='self q/k', shape='64x64', option=str(o), bytes=stored_bytes(o, (64, 64)), weights=4096, model='m',
                 damage=0. if o == 'dense' else 4.**(-effective_bits(o)/8))
            for n, m in layers.items() for o in menu(m) + shared_menu('self q/k', 8)]
    table = pd.DataFrame(rows)
    budget = bits_to_bytes(table, 2.5)
    found = {g: allocate(table, budget, share_gain=g) for g in (1, 1.2, 1e9)}
    damage = {g: price(table, c)[1] for g, c in found.items()}
    shares = {g: any(o != 'dense' and o.share for o in c.values()) for g, c in found.items()}
    assert all(price(table, c)[0] <= budget for c in found.values()) and shares[1] and not shares[1e9]
    assert damage[1] < damage[1e9] and shares[1.2] == (1.2*damage[1] < damage[1e9])
    close = allocate(table, budget, share_gain=damage[1e9]/damage[1]*1.001), allocate(table, budget, share_gain=damage[1e9]/damage[1]*.999)
    assert price(table, close[0])[1] == pytest.approx(damage[1e9]) and price(table, close[1])[1] == pytest.approx(damage[1])

def test_overrides_do_not_share(dense):
    with pytest.raises(ValueError, match='shares codebooks'): quantize_unet(copy.deepcopy(dense), 6, overrides={'*to_q': Scheme(2, 3, 8, share='mine')}, calibration=None, progress=False)
