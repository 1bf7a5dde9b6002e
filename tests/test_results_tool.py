"""`make results`: its plan, its budgets, how it goes on, and that every result file has a maker and a head."""
import importlib.util
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn

root = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location('results', root/'tools'/'results.py')
tool = sys.modules['results'] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)
results = root/'nbs'/'results'


@pytest.fixture
def away(tmp_path, monkeypatch):
    monkeypatch.setattr(tool, 'out', tmp_path/'shipped.csv')
    monkeypatch.setattr(tool, 'tried', tmp_path/'rates.csv')
    monkeypatch.setattr(tool, 'work', tmp_path/'work')
    return tmp_path


# ---------------------------------------------------------------- the plan

def test_the_plan_tells_every_row_and_every_file_and_does_nothing(away, capsys):
    tool.main(['--plan'])
    said = capsys.readouterr().out
    for name in [*tool.ROWS, *tool.MADE]: assert re.search(rf'^{re.escape(name)}\s', said, re.M), name
    assert 'hours of one core are left' in said and not list(away.iterdir())


def test_bad_arguments_are_refused(capsys):
    for args, why in ((['ours 7 bit'], "no row named 'ours 7 bit'"), (['--n', '1'], 'expected at least 2')):
        with pytest.raises(SystemExit) as e: tool.main(args)
        assert e.value.code == 2 and why in capsys.readouterr().err


def test_make_results_is_this_program():
    for args, more in (([], ''), (['PLAN=1'], '--plan'), (['N=512'], '--n 512')):
        said = subprocess.run(['make', '-n', 'results', *args], cwd=root, capture_output=True, text=True).stdout
        assert 'tools/results.py' in said and more in said


def test_rows_come_after_what_they_start_from():
    at = {name: i for i, name in enumerate(tool.ROWS)}
    for name, row in tool.ROWS.items():
        how = getattr(row.make, 'keywords', {})
        for other in {how.get('like'), how.get('base')} - {None}: assert at[other] < at[name], name
        student = tool.STUDENTS.get(how.get('student'))
        if student and getattr(student.begin, 'func', None) is tool.ours_begin: assert at[student.begin.args[0]] < at[name], name


# ---------------------------------------------------------------- budgets

def test_the_peer_has_as_many_steps_or_as_many_seconds(away, monkeypatch):
    "Ours: 200 s of encoding and 600 of training. The peer, whose own beginning takes 20: 9 steps as ours, or 780 s."
    asked, tool_trial = [], dict(rate=3e-3, loss=1., seconds=5.)
    monkeypatch.setattr(tool, 'trial', lambda student, rate: tool_trial | dict(rate=rate, loss=abs(rate - 1e-3)))
    monkeypatch.setattr(tool, 'train', lambda folder, model, config: asked.append(config) or dict(step=9, seconds=1.))
    begin = lambda: (nn.Linear(2, 2), {}, dict(encode_cpu_s=20.))
    monkeypatch.setitem(tool.STUDENTS, 'peer', tool.Student(begin, tool.PEER_TUNED))
    (away/'work'/'ours').mkdir(parents=True)
    tool.put(away/'work'/'ours', tool.Made(None, {}, dict(steps=9, encode_cpu_s=200., train_cpu_s=600.)))
    rows = [tool.trained(away, 'peer', **how).row for how in ({}, dict(like='ours', by='steps'), dict(like='ours', by='seconds'))]
    assert [(c.steps, c.minutes) for c in asked] == [(None, tool.MINUTES), (9, None), (None, 13.)]
    assert {c.lr for c in asked} == {1e-3}, 'the rate with the least held-out loss'
    assert all(r == dict(encode_cpu_s=20., steps=9, lr=1e-3, train_cpu_s=1., search_cpu_s=5.*len(tool.RATES)) for r in rows)


def test_all_students_search_the_same_grid_and_differ_in_what_they_are_only():
    ours, peer = tool.STUDENTS['ours 2 bit A8'].config, tool.STUDENTS['straight-through 2 bit A8'].config
    same = [k for k in vars(ours) if k not in ('lr', 'code_lr', 'lrs')]
    assert {k: getattr(ours, k) for k in same} == {k: getattr(peer, k) for k in same}


def test_seconds_add_up_over_processes(tmp_path):
    for _ in range(2):
        with tool.Spent(tmp_path) as spent: sum(i*i for i in range(10**6))
    assert spent.seconds > spent.before > 0 and math.isclose(json.loads((tmp_path/'spent.json').read_text()), spent.seconds, rel_tol=.5)


# ---------------------------------------------------------------- going on

def test_a_run_goes_on_where_it_was(away, monkeypatch):
    "Made models and drawn images stay; more images are added to those that are there."
    drawn, made = [], []
    def draw(pipe, n, batch, first, **sampling):
        drawn.append((first, n))
        gen = torch.Generator().manual_seed(first + (0 if pipe.unet is tool.shipped().unet else 1))
        return torch.rand(n, 1, 32, 32, generator=gen)
    monkeypatch.setattr(tool, 'sample_images', draw)
    monkeypatch.setattr(tool, 'PART', 4)
    monkeypatch.setattr(tool, 'ROWS', {k: tool.Row(lambda folder, k=k: made.append(k) or tool.Made(nn.Linear(2, 2), {}, dict(encode_cpu_s=1.)), 1)
                                       for k in ('full precision', 'one', 'two')})
    monkeypatch.setattr(tool, 'shipped', tool.lru_cache(lambda: tool.load_mini_ldm()))
    tool.remake(['full precision', 'one'], 6)
    assert made == ['full precision', 'one'] and drawn == [(0, 4), (4, 2)]*2
    assert tool.out.read_text().splitlines()[0].endswith('; unfinished')
    tool.remake(['full precision', 'one'], 6)
    assert len(drawn) == 4, 'nothing is left'
    tool.remake(list(tool.ROWS), 8)
    table = pd.read_csv(tool.out, comment='#').set_index('method')
    assert made == ['full precision', 'one', 'two'] and set(drawn[4:]) == {(0, 4), (4, 4)} and (0, 4) in drawn[6:]
    assert list(table.index) == list(tool.ROWS) and (table.images == 8).all() and tool.out.read_text().splitlines()[0].endswith('; complete')
    assert table.psnr['full precision'] == math.inf and table.psnr_mean_se['one'] > 0 and table.accuracy_low['one'] <= table.accuracy['one']
    head = tool.out.read_text().splitlines()[0]
    assert head.startswith('# make results') and re.search(r'commit \S+; \d{4}-\d\d-\d\d; .*, torch ', head)


# ---------------------------------------------------------------- files and their makers

def cells(path): return [''.join(c['source']) for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code']


def test_every_result_file_has_a_maker_that_exists():
    own = {tool.out.name, tool.tried.name}
    there = {o.name for o in results.iterdir() if not o.name.startswith('gpu_')}
    assert there - own <= tool.MADE.keys(), f'tools/results.py: name what makes {sorted(there - own - tool.MADE.keys())} in MADE'
    for name, (command, _, note) in tool.MADE.items():
        book = re.search(r'--path (nbs/\S+\.ipynb) --flags slow', command)
        if not book: assert command.startswith(('aquatic ', 'python ')) or note, name; continue
        assert (root/book[1]).exists(), (name, book[1])
        stem = name.rpartition('.')[0]
        written = '\n'.join(s for s in cells(root/book[1]) if re.search(r'^#\|\s*slow', s, re.M))
        dynamic = re.search(r"results/\{\w+\}|\{name\}\.csv|f'[a-z_]*\{\w+\}\.csv'", written) # a name put together
        assert stem in written or dynamic, f'{name}: no slow cell of {book[1]} names it'


HEADS_OF_BEFORE = { # written before heads were stamped; each goes from here when it is made again
    'cpu_layers.csv', 'cpu_unet.csv', 'cpu_rule.csv', 'cpu_lut.csv', 'cuda_build.csv', 'laq_additivity.csv', 'laq_table.csv', 'train_ae_kl.csv', 'train_ae_vq.csv', 'train_classes.csv',
    'train_classifier.csv', 'train_quality.csv', 'train_unet.csv'}


def test_every_table_says_what_made_it_when_and_where():
    for path in results.glob('*.csv'):
        head = ' '.join(o for o in path.read_text(encoding='utf-8').splitlines()[:4] if o.startswith('#'))
        if path.name in HEADS_OF_BEFORE: continue
        if {'machine', 'date'} <= set(pd.read_csv(path, comment='#').columns): continue # every row says it for itself
        assert re.search(r'\d{4}-\d\d-\d\d', head) and 'torch ' in head, f'{path.name}: {head[:200]}'
        if max(re.findall(r'\d{4}-\d\d-\d\d', head)) > '2026-11-27': assert 'commit ' in head, f'{path.name}: its head names no commit'
