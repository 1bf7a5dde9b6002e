"""Every notebook runs, as nbdev_test runs it, and what its cells say now is what they say in the file.

`python tests/outputs.py` looks at all notebooks, `python tests/outputs.py nbs/01_theory/01_aq.ipynb` at some; `--store` puts new text in the place of text
that differs (pictures stay). Slow cells and those for a GPU are not run. Text is compared word by word; numbers may differ by the last digit shown and, where they
are not whole, by TOLERANCE: other processors add in another order. Seconds, rates, dates, paths, machines and progress bars are not compared. A cell says
`#| tol .2` where its numbers, whole ones too, may differ by a fifth, and `#| volatile` where nothing of it repeats. Processors of another kind choose other
kernels and add in another order: there (tests/outputs_machine.txt says which kind the text is from) what differs is told, and only a notebook that does not run to
its end fails. `--strict` compares anywhere.
"""
import argparse, base64, io, json, os, re, subprocess, sys, time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

root = Path(__file__).resolve().parents[1]
TOLERANCE = .02
NOT_RUN = 'it did not run to the end'
NUMBER = re.compile(r'(?<![A-Za-z_0-9.])[-+]?\d+(?:,\d{3})*(?:\.\d+)?(?:[eE][-+]?\d+)?')
BAR = re.compile(r'\d+%\||\?it/s|it/s\]|s/it\]')
UNIT = r'(?:CPU |processor |wall )?(?:s|ms|us|µs|ns|min|h|seconds?|minutes?|hours?|milliseconds|microseconds|it/s|[GMk]B/s|GFLOP/s|[GTM]flops?/s)'
VOLATILE = [(re.compile(p), to) for p, to in (
    (r'\x1b\[[0-9;]*m', ''), (r'0x[0-9a-f]{6,}', '<address>'), (r'\d{4}-\d\d-\d\d(?:[T ]\d\d:\d\d\S*)?', '<date>'),
    (r'(?:/[\w.+-]+){2,}/?', '<path>'), (r'.*(?:x86_64|aarch64|arm64), Python .*', '<machine>'),
    (rf'(?:\d[\d.,]*(?:e[-+]?\d+)? ?(?:to|and|-|/|of) ?)*\d[\d.,]*(?:e[-+]?\d+)? ?{UNIT}\b', '<time>'))]

def text_of(outputs):
    "What a cell printed, then what it showed as text: of tables the plain one, of pictures only that they are there. (Front ends differ in what comes first.)"
    printed, shown = [], []
    for o in outputs:
        if o['output_type'] == 'stream': printed.append(joined(o['text']) if o.get('name') != 'stderr' else '')
        elif o['output_type'] == 'error': shown.append(o.get('ename', 'an error'))
        else:
            data = o.get('data', {})
            kind = next((k for k in ('image/png', 'image/svg+xml', 'text/markdown', 'text/plain', 'text/html') if k in data), None)
            if kind: shown.append('<picture>' if kind.startswith('image') else joined(data[kind]))
    return '\n'.join([''.join(printed), *shown])

def joined(o): return ''.join(o) if isinstance(o, list) else str(o)

def parts(text):
    "(the words, the numbers as they are written) of an output, without what never repeats."
    lines = [l.rpartition('\r')[2] for l in text.splitlines()]
    text = '\n'.join(l for l in lines if not BAR.search(l))
    for pattern, to in VOLATILE: text = pattern.sub(to, text)
    text = re.sub(r'[-=_]{4,}', '---', text)
    return ' '.join(NUMBER.sub('#', text).split()), NUMBER.findall(text)

def apart(a, b, tol):
    "Are two numbers, as written, further apart than rounding and the tolerance allow?"
    x, y = (float(o.replace(',', '')) for o in (a, b))
    whole = all(re.fullmatch(r'[-+]?[\d,]+', o) for o in (a, b))
    if whole and tol is None: return x != y
    return abs(x - y) > (TOLERANCE if tol is None else tol)*max(abs(x), abs(y)) + .505*(last_digit(a) + last_digit(b))

def last_digit(o):
    "What one in the last digit that is shown is worth; whole numbers are exact."
    mantissa, _, exponent = o.replace(',', '').lower().partition('e')
    decimals = len(mantissa.partition('.')[2])
    return 10.**(int(exponent or 0) - decimals) if decimals or exponent else 0.

def difference(old, new, tol=None):
    "In what two outputs of a cell differ, in words; None where they agree."
    (words, numbers), (now, found) = parts(text_of(old)), parts(text_of(new))
    if words != now:
        at = next((i for i, (a, b) in enumerate(zip(words, now)) if a != b), min(len(words), len(now)))
        show = lambda o: repr(o[max(0, at - 40):at + 60])
        return f'stored {show(words)}, now {show(now)}'
    off = [(a, b) for a, b in zip(numbers, found) if apart(a, b, tol)]
    return ', '.join(f'stored {a}, now {b}' for a, b in off[:4]) + (f' and {len(off) - 4} more' if off[4:] else '') if off else None

def directives(source):
    "(is nothing of the cell compared?, its own tolerance or None); ValueError for one that can't be read."
    if re.search(r'^#\|\s*volatile\s*$', source, re.M): return True, None
    found = re.search(r'^#\|\s*tol\b(.*)$', source, re.M)
    if not found: return False, None
    try: return False, float(found[1])
    except ValueError: raise ValueError(f"'{found[0]}': expected a number, such as #| tol .05") from None

def differences(stored, now):
    "(cell, its number, in what it differs) of the cells of a notebook; now: id -> outputs of those that ran."
    for i, cell in enumerate(stored['cells']):
        if cell['cell_type'] != 'code' or not cell.get('outputs') or cell['id'] not in now: continue
        volatile, tol = directives(joined(cell['source']))
        why = None if volatile else difference(cell['outputs'], now[cell['id']], tol)
        if why: yield cell, i, why

def run(path):
    "(did it run to the end?, id -> outputs) of a notebook, by nbdev_test's own function."
    import nbdev.test as runner
    import pandas as pd
    pd.set_option('display.max_columns', 20, 'display.width', 80) # as in a kernel; without one pandas fits tables to a terminal
    class Recorder(runner.CaptureShell):
        def run_all(self, nb, *args, **kw):
            Recorder.nb = nb
            return super().run_all(nb, *args, **kw)
    old = runner.CaptureShell
    runner.CaptureShell = Recorder
    try: ok, _ = runner.test_nb(path, skip_flags=['slow', 'cuda'], basepath=root)
    finally: runner.CaptureShell = old
    return ok, {c.id: json.loads(json.dumps(c.get('outputs') or [], default=str)) for c in Recorder.nb.cells if c.cell_type == 'code'}

def smaller(png, wide=900):
    "A picture as the book keeps it: 900 pixels wide at most, 64 colours."
    from PIL import Image
    image = Image.open(io.BytesIO(base64.b64decode(joined(png)))).convert('RGB')
    if image.width > wide: image = image.resize((wide, round(image.height*wide/image.width)), Image.LANCZOS)
    image.quantize(64).save(buffer := io.BytesIO(), 'PNG', optimize=True)
    return base64.b64encode(buffer.getvalue()).decode() + '\n'

def store(path, nb, found, now):
    "New text in the place of the old; the pictures of a cell stay where there are as many, else they are new as well."
    for cell, _, _ in found:
        old = [o for o in cell['outputs'] if 'image/png' in o.get('data', {})]
        new = now[cell['id']]
        if old and len(old) == sum('image/png' in o.get('data', {}) for o in new):
            new = [old.pop(0) if 'image/png' in o.get('data', {}) else o for o in new]
        else:
            for o in new:
                if 'image/png' in o.get('data', {}): o['data']['image/png'] = smaller(o['data']['image/png'])
        cell['outputs'] = [o for o in new if o.get('name') != 'stderr']
    path.write_text(json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + '\n', encoding='utf-8')

KIND = root/'tests'/'outputs_machine.txt'

def kind():
    "The kind of processor: its name, and the width that is used."
    from aquatic_nb.core import machine
    return ', '.join(machine().split(', ')[:2])

def look(path, keep=False, strict=True):
    "(name, seconds, what is wrong) of a notebook."
    start, stored = time.time(), json.loads(path.read_text(encoding='utf-8'))
    ok, now = run(path)
    found = list(differences(stored, now)) if ok else []
    if keep and found: store(path, stored, found, now)
    wrong = [f"cell {i} ({cell['id']}): {why}" for cell, i, why in found] if ok else [NOT_RUN]
    print(f'- {path.relative_to(root)}: ' + ('; '.join(wrong) or 'as stored'), flush=True)
    return path.name, time.time() - start, wrong if strict or not ok else []

def notebooks(): # as nbdev finds them
    return sorted(o for o in (root/'nbs').rglob('*.ipynb') if not any(p[0] in '._' for p in o.relative_to(root/'nbs').parts))

def main(args=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('notebooks', nargs='*', type=Path, help='some of them (all)')
    p.add_argument('--store', action='store_true', help='put what cells say now in the place of what they said')
    p.add_argument('--workers', type=int, default=2, help='processes')
    p.add_argument('--strict', action='store_true', help='compare, whatever processor this is')
    args = p.parse_args(args)
    here, stored_on = kind(), KIND.read_text(encoding='utf-8').strip() if KIND.exists() else ''
    strict = args.strict or args.store or here == stored_on
    if not strict: print(f'text is from {stored_on or "another machine"}, this is {here}: what differs is told, not judged')
    paths = [o.resolve() for o in args.notebooks] or notebooks()
    if missing := [o for o in paths if not o.exists()]: p.error(f'there is no {missing[0]}')
    import outputs # a notebook that runs takes the place of __main__, where a worker would look for `look`
    work = partial(outputs.look, keep=args.store, strict=strict)
    if len(paths) == 1 or args.workers < 2: found = [work(o) for o in paths]
    else:
        with ProcessPoolExecutor(args.workers) as pool: found = list(pool.map(work, paths))
    for name, seconds, _ in sorted(found, key=lambda o: -o[1])[:4]: print(f'{name}: {seconds:.0f} secs')
    if args.store and len(found) == len(notebooks()): KIND.write_text(here + '\n', encoding='utf-8')
    bad = [name for name, _, wrong in found if wrong]
    if len(found) > 1 and not args.store: # a process that ran other notebooks before may hold what they left: only what differs again counts
        again = [o for o in paths if o.name in bad]
        bad = [o.name for o in again if subprocess.run([sys.executable, __file__, str(o), *['--strict']*strict]).returncode]
    bad = bad if not args.store else [name for name, _, wrong in found if wrong == [NOT_RUN]]
    if bad: sys.exit(f"{len(bad)} of {len(found)} notebooks are not what they say: {', '.join(bad)}; look at the cell, then "
                                        'python tests/outputs.py --store NOTEBOOK, or give the cell #| tol or #| volatile')
    print(f'Success: {len(found)} notebooks')

if __name__ == '__main__':
    os.environ.setdefault('MPLBACKEND', 'agg')
    main()
