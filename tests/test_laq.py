"Sensitivity tables and allocations across modules."
import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st

from aquatic_nb import laq
from aquatic_nb.aq import Scheme, parse_scheme, stored_bytes
from aquatic_nb.core import generator
from aquatic_nb.knapsack import _knapsack, allocate, bits_to_bytes, check_table, price
from aquatic_nb.menu import menu

def made_table(seed=0, layers=6):
    "A table as `sensitivity` makes it, with invented damages."
    rng, rows = np.random.default_rng(seed), []
    for i in range(layers):
        shape = (96, 96, 3, 3) if i % 2 else (192, 192)
        module = torch.nn.Conv2d(96, 96, 3) if i % 2 else torch.nn.Linear(192, 192)
        hurt = 10.**rng.uniform(-8, -1)
        for j, o in enumerate(menu(module)):
            rows.append(dict(layer=f'block.{i}.{"conv1" if i % 2 else "to_q"}', kind='other', shape='x'.join(map(str, shape)), option=str(o), bytes=stored_bytes(o, shape),
                             weights=int(np.prod(shape)), damage=0. if o == 'dense' else hurt*4.**-j, model='m'))
    return pd.DataFrame(rows)

@given(st.lists(st.lists(st.tuples(st.integers(1, 500), st.floats(1e-9, 1.)), min_size=1, max_size=4), min_size=1, max_size=5), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_knapsack_is_exact(raw, at):
    groups = []
    for g in raw:
        size = np.cumsum([s for s, _ in g]); hurt = np.sort([h for _, h in g])[::-1].copy()
        groups.append((size, hurt))
    low, high = sum(g[0][0] for g in groups), sum(g[0][-1] for g in groups)
    budget = int(low + at*(high - low))
    total = lambda c, i: sum(g[i][k] for g, k in zip(groups, c))
    best = min(total(c, 1) for c in itertools.product(*[range(len(g[0])) for g in groups]) if total(c, 0) <= budget)
    got = _knapsack(groups, budget)
    assert total(got, 0) <= budget
    assert total(got, 1) <= best*(1 + 1e-7)

@given(st.floats(.5, 12.))
@settings(max_examples=25, deadline=None)
def test_any_average_is_met(bits):
    table = made_table()
    budget = bits_to_bytes(table, bits)
    choice = allocate(table, budget)
    size, _ = price(table, choice)
    assert size <= budget
    assert sorted(choice) == sorted(set(table.layer))

def test_more_bytes_never_hurt():
    table = made_table(3)
    hurt = [price(table, allocate(table, bits_to_bytes(table, b)))[1] for b in (.6, 1., 1.5, 2., 2.37, 3., 4., 6., 8.)]
    assert all(a >= b*(1 - 1e-9) for a, b in zip(hurt, hurt[1:]))

def test_price_is_stored_bytes():
    table = made_table()
    choice = allocate(table, bits_to_bytes(table, 2.))
    shapes = table.drop_duplicates('layer').set_index('layer')['shape']
    want = sum(stored_bytes(o, tuple(map(int, shapes[n].split('x')))) for n, o in choice.items())
    assert price(table, choice)[0] == want

def test_overrides():
    table = made_table()
    choice = allocate(table, bits_to_bytes(table, 5.), overrides={'*conv1': 'uniform8', 'block.1.*': Scheme(3, 5, 9)})
    assert str(choice['block.3.conv1']) == 'uniform8' and choice['block.1.conv1'] == Scheme(3, 5, 9)
    assert price(table, choice)[0] <= bits_to_bytes(table, 5.)

def test_infeasible_names_the_nearest():
    table = made_table()
    with pytest.raises(ValueError, match=r'nearest possible is (\d+) bytes') as e: allocate(table, 1000)
    least = int(str(e.value).split('nearest possible is ')[1].split()[0])
    assert price(table, allocate(table, least))[0] == least
    with pytest.raises(ValueError, match=f'nearest possible is {least} bytes'): allocate(table, least - 1)
    with pytest.raises(ValueError, match='below what'): allocate(table, bits_to_bytes(table, 3.), overrides={'*': 'dense'})

@pytest.mark.parametrize('bad,word', [(lambda t: t.drop(columns='bytes'), 'bytes'), (lambda t: t.assign(damage=-1.), 'damage'), (lambda t: t.assign(damage=float('nan')), 'damage'),
                                      (lambda t: pd.concat([t, t.iloc[:1]]), 'twice')])
def test_bad_tables_are_refused(bad, word):
    with pytest.raises(ValueError, match=word): allocate(bad(made_table()), 10**6)

def test_table_of_another_model():
    with pytest.raises(ValueError, match='another model'): check_table(made_table(), torch.nn.Sequential(torch.nn.Linear(8, 8)))

def test_pattern_without_match():
    with pytest.raises(ValueError, match=r"'nothing\*'"): allocate(made_table(), 10**6, overrides={'nothing*': 'dense'})

@pytest.mark.parametrize('module', [torch.nn.Conv2d(3, 8, 3), torch.nn.Linear(5, 3), torch.nn.Conv2d(8, 4, 1), torch.nn.Linear(512, 512), torch.nn.Conv2d(4, 4, 5)])
def test_menu_is_a_front(module):
    options, shape = menu(module), tuple(module.weight.shape)
    sizes = [stored_bytes(o, shape) for o in options]
    assert sizes == sorted(sizes) and 'dense' in options and len(set(map(str, options))) == len(options)
    for o in options:
        assert parse_scheme(str(o)) == o

def test_some_rows_stand_for_all(monkeypatch):
    "Wide layers are tried on every so many rows; estimates and measured damages are those of all rows, nearly."
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 128, 3, padding=1), torch.nn.SiLU(), torch.nn.Conv2d(128, 384, 3, padding=1)).eval()
    calls = [dict(input=torch.randn(4, 3, 8, 8, generator=generator(i, 'x'))) for i in range(3)]
    assert laq._every(384, 128*9, 9) == 3 and laq._every(128, 27, 9) == 1
    def table(): return laq.sensitivity(net, calls, progress=False, workers=1).set_index(['layer', 'option'])
    part = table()
    monkeypatch.setattr(laq, '_every', lambda O, N, d: 1)
    whole = table()
    assert list(whole.index) == list(part.index)
    for column in ('cheap', 'measured', 'h_error'):
        a, b = whole.loc['2', column], part.loc['2', column]
        both = (a > 0) & (b > 0)
        assert both.sum() > 1 and ((a/b)[both] < 1.3).all() and ((b/a)[both] < 1.3).all(), column
    assert whole.loc['0', 'damage'].equals(part.loc['0', 'damage'])
