"""The gate of stored outputs: it catches what changed, and lets pass what never repeats."""
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

root = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location('outputs', root/'tests'/'outputs.py')
tool = sys.modules['outputs'] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)


def said(text): return [dict(output_type='stream', name='stdout', text=text.splitlines(keepends=True))]


@given(st.floats(-1e6, 1e6, allow_nan=False).filter(lambda x: abs(x) > 1e-3), st.integers(2, 5))
def test_a_number_that_moved_by_a_tenth_is_caught(x, digits):
    a, b = (f'error {o:.{digits}e} at the end' for o in (x, 1.1*x))
    assert tool.difference(said(a), said(a)) is None
    assert 'stored' in tool.difference(said(a), said(b))
    assert tool.difference(said(a), said(b), tol=.2) is None


@given(st.integers(0, 10**7), st.integers(1, 9))
def test_whole_numbers_are_exact(n, more):
    assert tool.difference(said(f'{n:,} bytes'), said(f'{n + more:,} bytes'))
    assert tool.difference(said(f'{n:,} bytes'), said(f'{n:,} bytes')) is None


@pytest.mark.parametrize('old, new', [
    ('took 3.2 s', 'took 11 s'), ('0.8 ms, 12.5 GB/s', '0.9 ms, 3 GB/s'), ('12 to 15 minutes', '100 to 130 minutes'),
    ('<f at 0x7f0011223344>', '<f at 0x7f99aabbccdd>'), ('2026-11-21', '2027-01-02'), ('/tmp/a1/x.csv there', '/home/me/b/x.csv there'),
    ('AMD EPYC, AVX512, 2 cores, 1 thread, x86_64, Python 3.11.7, torch 2.13.0', 'Apple M9, 8 cores, arm64, Python 3.12.1, torch 2.14'),
    ('a bar:  50%|###   | 1/2 [00:01<00:01, 1.0it/s]\nend', 'end'), ('a\n\n  b', 'a b'), ('loss 0.123', 'loss 0.124'), ('\x1b[31mred\x1b[0m', 'red')])
def test_what_never_repeats_is_not_compared(old, new): assert tool.difference(said(old), said(new)) is None


@pytest.mark.parametrize('old, new', [
    ('ConvTranspose2d is neither', 'Scaled is a subclass'), ('loss 0.123', 'loss 0.133'), ('83 layers', '82 layers'), ('4.41x', '2.41x'), ('W2: 1.99', 'W2A8: 1.99'),
    ('a 1 2 3', 'a 1 2'), ('err 1e-3', 'err 1e-5'), ('True', 'False'), ('[1, -2]', '[1, 2]')])
def test_what_the_code_no_longer_says_is_caught(old, new): assert tool.difference(said(old), said(new))


def test_tables_and_pictures():
    shown = lambda **data: [dict(output_type='display_data', data=data, metadata={})]
    picture = {'image/png': 'abc', 'text/plain': '<Figure size 600x220>'}
    assert tool.difference(shown(**picture), shown(**picture | {'image/png': 'other'})) is None
    assert tool.difference(shown(**picture), [])
    assert tool.difference(shown(**picture) + said('x'), said('x') + shown(**picture)) is None, 'front ends differ in what comes first'
    table = {'text/html': '<table>', 'text/plain': '   a\n0  1'}
    assert tool.difference(shown(**table), shown(**table | {'text/plain': '   a\n0  2'}))
    assert tool.difference(said('x') + [dict(output_type='stream', name='stderr', text='a warning')], said('x')) is None


def test_directives():
    assert tool.directives('#| volatile\nprint(1)') == (True, None) and tool.directives('#| tol .05\nprint(1)') == (False, .05)
    assert tool.directives('print(1) # volatile') == (False, None)
    with pytest.raises(ValueError, match='expected a number'): tool.directives('#| tol a bit\n')


def write(path, *cells):
    cells = [dict(cell_type='code', execution_count=None, id=f'cell{i}', metadata={}, outputs=said(out) if out else [], source=source.splitlines(keepends=True))
             for i, (source, out) in enumerate(cells)]
    path.write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)))
    return path


def test_a_notebook_is_run_and_its_stale_cell_found_and_stored(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tool, 'root', tmp_path)
    path = write(tmp_path/'a.ipynb', ('x = 2.5', ''), ('print(x, 7)', '2.5 7\n'), ('print(2*x)', '4.0\n'), ('#| slow\nprint(1/0)', 'never run\n'),
                 ('#| tol .5\nprint(2*x)', '4.0\n'), ('#| volatile\nprint(x)', 'something else\n'))
    name, _, wrong = tool.look(path)
    assert name == 'a.ipynb' and len(wrong) == 1 and wrong[0] == 'cell 2 (cell2): stored 4.0, now 5.0'
    with pytest.raises(SystemExit, match='--store'): tool.main([str(path)])
    tool.main([str(path), '--store'])
    assert tool.look(path)[2] == [] and ''.join(json.loads(path.read_text())['cells'][3]['outputs'][0]['text']) == 'never run\n'
    broken = write(tmp_path/'b.ipynb', ('1/0', ''))
    assert tool.look(broken)[2] == ['it did not run to the end']


def test_directives_in_the_book_can_be_read():
    for path in tool.notebooks():
        for cell in json.loads(path.read_text(encoding='utf-8'))['cells']:
            if cell['cell_type'] == 'code': tool.directives(''.join(cell['source']))


def test_what_only_reads_a_committed_file_says_so():
    "An assertion about a file that lies in the repository tests the file: such a cell is called a reading."
    for path in tool.notebooks():
        for cell in json.loads(path.read_text(encoding='utf-8'))['cells']:
            source = ''.join(cell['source'])
            if cell['cell_type'] != 'code' or re.search(r'^#\|\s*(slow|cuda)\b', source, re.M): continue
            reads = re.search(r'read_csv\(|read_peers\(|read_text\(|json\.load', source) and 'results/' in source
            if reads and re.search(r'^\s*assert|^test_', source, re.M): assert '# a reading' in source, f'{path.name}, cell {cell["id"]}'


def test_claims_are_said_in_one_way():
    "Each chapter of a part that the paper names says what is published and what is our reading, and leads to the one table; README leads there too."
    books = {o.name.split('_')[0]: o for o in tool.notebooks() if o.name[0].isdigit()}
    markdown = lambda o: '\n'.join(''.join(c['source']) for c in json.loads(o.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'markdown')
    for number in ('01', '02', '11', '13', '17', '20', '21', '30'):
        said = markdown(books[number])
        assert re.search(r'\*Published:\* .*\*Our reading:\* .*paper\.ipynb#all-of-it-in-one-table', said), books[number].name
    table = markdown(root/'nbs'/'tutorials'/'paper.ipynb')
    assert '## All of it in one table' in table and all(f'/{number}_' in table for number in ('01', '02', '11', '13', '17', '20', '21', '30'))
    front = (root/'README.md').read_text(encoding='utf-8')
    assert 'is our reading' in front and 'nbs/tutorials/paper.ipynb' in front


def test_the_first_page_says_it_in_thirty_seconds():
    front = (root/'README.md').read_text(encoding='utf-8')
    top = front[:front.index('## ')]
    for what in (r'\d+\.\d MB in half precision and \d+\.\d MB at 2 bits', r'1,529 MB', r'random', r'\d+\.\d dB', r'AMD EPYC with AVX-512|\w+ with AVX-?512', r'`make demo`',
                 r'!\[', r'LDM-4 itself was not run'): assert re.search(what, top), what
    assert len(re.findall(r'^\| (?!\|)', top, re.M)) <= 5 and 'git clone' in front and 'load_mini_sd' in front


def test_stored_pictures_are_small():
    import base64
    import io

    from PIL import Image
    Image.new('RGB', (1800, 300), 'red').save(buffer := io.BytesIO(), 'PNG')
    small = Image.open(io.BytesIO(base64.b64decode(tool.smaller(base64.b64encode(buffer.getvalue()).decode()))))
    assert small.size == (900, 150) and small.mode == 'P'
