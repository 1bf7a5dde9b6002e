"""The rules of the house that a machine can check."""
import ast, configparser, importlib, inspect, json, re, shlex, subprocess, sys
from pathlib import Path
import pytest

root = Path(__file__).resolve().parents[1]
lib, nbs = root/'aquatic_nb', root/'nbs'
books = sorted(o for o in nbs.rglob('*.ipynb') if not any(p[0] in '._' for p in o.relative_to(nbs).parts))
numbered = sorted((o for o in books if re.match(r'\d', o.name)), key=lambda o: int(o.name.split('_')[0]))
module_of = lambda path: '.'.join(path.relative_to(lib).with_suffix('').parts)
modules = sorted(module_of(o) for o in lib.rglob('*.py') if not o.stem.startswith('_'))
name_of = lambda nb: re.sub(r'^\d+[a-z]?_', '', nb.stem)

def cells(nb, kind='code'):
    return [''.join(c['source']) for c in json.loads(nb.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == kind]

def exported(nb): return [o for o in cells(nb) if re.search(r'^#\|\s*export[si]?\b', o, re.M)]

def exports(nb):
    "The module that a notebook writes, or None."
    found = re.search(r'#\|\s*default_exp\s+(\S+)', '\n'.join(cells(nb)))
    return found and found[1]

order = {exports(o): i for i, o in enumerate(numbered) if exports(o)}

def test_every_module_has_its_notebook():
    assert sorted(order) == modules
    for nb in numbered:
        if exports(nb): assert exports(nb).rpartition('.')[2] in (name_of(nb), name_of(nb).removesuffix('ned') + 'layers', 'layers'), nb.name

def test_numbers_go_up_through_the_parts():
    numbers = [int(o.name.split('_')[0]) for o in numbered]
    assert len(numbers) == len(set(numbers)), numbers
    parts = [o.relative_to(nbs).parts[0] for o in numbered if o.parent != nbs]
    assert parts == sorted(parts), 'the number of a notebook and that of its part tell one order'

def rooms_named(tree, package):
    "Rooms of ours that code imports: by `import`, by `from`, and by text given to `import_module` or `__import__`."
    for node in ast.walk(tree):
        if isinstance(node, ast.Import): yield from ((node, o.name) for o in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else []
            module = '.'.join([*base, *([node.module] if node.module else [])])
            yield node, module
            yield from ((node, f'{module}.{o.name}') for o in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, 'id', getattr(node.func, 'attr', '')) in ('import_module', '__import__'):
            for a in node.args:
                if isinstance(a, ast.Constant) and isinstance(a.value, str): yield node, a.value
                elif isinstance(a, ast.JoinedStr): yield node, ''.join(str(getattr(o, 'value', '*')) if isinstance(o, ast.Constant) else '*' for o in a.values)

def test_a_room_imports_lower_rooms_plainly():
    wrong = []
    for name in modules:
        path = lib.joinpath(*name.split('.')).with_suffix('.py')
        tree = ast.parse(path.read_text(encoding='utf-8'))
        for node, used in rooms_named(tree, ['aquatic_nb', *name.split('.')[:-1]]):
            if not used.startswith('aquatic_nb.'): continue
            room = used.removeprefix('aquatic_nb.')
            room = room if room in order else room.rpartition('.')[0]
            if isinstance(node, ast.Call): wrong.append(f'{name}:{node.lineno} names {used} in a string')
            elif room in order and order[room] >= order[name]: wrong.append(f'{name} imports {room}, which comes later')
            elif room in order and node not in tree.body: wrong.append(f'{name}:{node.lineno} imports {room} late')
    assert not wrong, '\n'.join(wrong)

KERNELS = ('kernels.', 'cpu', 'cuda')

def body_lines(src):
    "Lines of a cell without imports, blank lines, and what documents parameters and fields."
    tree, told = ast.parse(src), set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)): told |= set(range(node.lineno + 1, node.body[0].lineno))
        if isinstance(node, (ast.AnnAssign, ast.Import, ast.ImportFrom)): told |= set(range(node.lineno, node.end_lineno + 1))
    return [l for i, l in enumerate(src.splitlines(), 1) if i not in told and l.strip() and not l.startswith('#|')]

def test_exported_cells_are_short():
    long = []
    for nb in numbered:
        kernels = (exports(nb) or '').startswith(KERNELS)
        for src in exported(nb):
            if len(lines := body_lines(src)) > (40 if kernels else 25): long.append(f'{nb.name}: {len(lines)} lines: {lines[0][:60]}')
    assert not long, '\n'.join(long)

def test_public_names_are_few():
    "What serves inside the house is exported by `#| exporti`, or begins with `_`: half of the 546 names of the first house."
    names = {n: importlib.import_module(f'aquatic_nb.{n}').__all__ for n in modules}
    assert sum(map(len, names.values())) <= 273, {n: len(v) for n, v in names.items()}

def test_lines_are_short():
    long = [f'{nb.name}: {l.strip()[:90]}' for nb in numbered for src in exported(nb) for l in src.splitlines() if len(l) > 110]
    assert not long, '\n'.join(long)

def test_no_room_is_larger_than_the_others_together():
    "No module holds more than 8% of the library's lines."
    size = {n: len(lib.joinpath(*n.split('.')).with_suffix('.py').read_text(encoding='utf-8').splitlines()) for n in modules}
    large = {n: s for n, s in size.items() if s > .08*sum(size.values())}
    assert not large, large

def test_no_loose_ends_in_the_library():
    found = []
    for o in lib.rglob('*.py'):
        for i, line in enumerate(o.read_text(encoding='utf-8').splitlines(), 1):
            if re.search(r'\b(TODO|FIXME|XXX)\b|raise NotImplementedError|\bpass\s+#|^\s*from \S+ import \*', line): found.append(f'{o.name}:{i}: {line.strip()}')
            if o.stem != '_modidx' and re.search(r'[\u0370-\u03ff]', re.sub(r'#.*|"[^"]*"|\'[^\']*\'', '', line)): found.append(f'{o.name}:{i}: Greek identifier')
            if re.search(r'\b(torch\.manual_seed|np\.random\.seed|random\.seed)\(', line): found.append(f'{o.name}:{i}: global seed')
    assert not found, '\n'.join(found)

def test_first_cells():
    bad = []
    for nb in numbered:
        text, code = cells(nb, 'markdown')[0], cells(nb)
        if not re.match(r'# .+\n+> .+', text): bad.append(f'{nb.name}: the first cell is `# Title` and `> one line`')
        if not exports(nb): continue # the tour
        if '#| default_exp' not in code[0]: bad.append(f'{nb.name}: the first code cell is `#| default_exp`')
        if 'nbdev_export()' not in code[-1]: bad.append(f'{nb.name}: the last cell exports')
    assert not bad, '\n'.join(bad)

def test_import_cells_are_pure():
    "A cell that mixes imports with other code is executed when nbdev makes the docs."
    mixed = []
    for nb in books:
        for src in cells(nb):
            if re.search(r'^\s*[%!]|^#\|\s*eval:\s*false', src, re.M) or 'nbdev_export()' in src: continue
            body = ast.parse(src).body
            imports = [isinstance(o, (ast.Import, ast.ImportFrom)) for o in body]
            if any(imports) and not all(imports): mixed.append(f'{nb.name}: {src.splitlines()[0][:40]} ... {ast.unparse(body[imports.index(True)])}')
    assert not mixed, '\n'.join(mixed)

def test_sizes():
    big = [f'{o.name}: {o.stat().st_size/1e3:.0f} kB' for o in books if o.stat().st_size > 600e3]
    assert not big, big
    total = sum(o.stat().st_size for o in nbs.rglob('*') if o.is_file() and not o.name.endswith('.failed'))
    assert total <= 6 * 2**20, f'nbs/ holds {total/2**20:.1f} MiB'
    assets = sum(o.stat().st_size for o in (lib/'assets').rglob('*') if o.is_file())
    assert assets <= 36 * 2**20 + 30e6, f'assets hold {assets/2**20:.1f} MiB'

def public(name):
    "Functions and classes that a module lists as its own."
    mod = importlib.import_module(f'aquatic_nb.{name}')
    for sym in mod.__all__:
        o = getattr(mod, sym)
        if callable(o) and getattr(o, '__module__', '') == mod.__name__: yield sym, o

@pytest.mark.parametrize('name', modules)
def test_public_names_are_explained(name):
    "A docstring, and a comment on every parameter."
    from fastcore.docments import docments
    missing = []
    for sym, o in public(name):
        if not (o.__doc__ or '').strip(): missing.append(f'{sym} has no docstring')
        if isinstance(o, type): continue
        rest = [p.name for p in inspect.signature(o).parameters.values() if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        for p, d in docments(o, full=True).items():
            if p not in ('return', *rest) and not d.get('docment'): missing.append(f'{sym}: parameter {p} has no comment')
    assert not missing, '\n'.join(missing)

def test_settings_and_package_agree():
    cfg = configparser.ConfigParser(delimiters=['='], interpolation=None)
    cfg.read(root/'settings.ini')
    cfg = cfg['DEFAULT']
    assert f'__version__ = "{cfg["version"]}"' in (lib/'__init__.py').read_text()
    pinned = {l.split('==')[0].lower().replace('_', '-') for l in (root/'constraints.txt').read_text().splitlines() if '==' in l}
    wanted = {re.split(r'[<>=!~\[]', o)[0].lower().replace('_', '-') for k in ('requirements', 'dev_requirements') for o in shlex.split(cfg[k])}
    assert wanted <= pinned, f'not in constraints.txt: {sorted(wanted - pinned)}'
    assert not (root/'pyproject.toml').exists(), 'nbdev 2 reads settings.ini; a pyproject.toml would hide it'

def test_sidebar_lists_every_notebook():
    import yaml
    listed = json.dumps(yaml.safe_load((nbs/'sidebar.yml').read_text(encoding='utf-8')))
    missing = [str(o.relative_to(nbs)) for o in books if f'"{o.relative_to(nbs)}"' not in listed]
    assert not missing, f'run python tools/docs.py --sidebar and commit nbs/sidebar.yml: {missing}'

def test_import_is_cheap():
    "`import aquatic_nb` leaves diffusers, numba, matplotlib and pandas alone."
    code = 'import sys, aquatic_nb; print([o for o in ("diffusers", "numba", "matplotlib", "pandas", "torch_fidelity") if o in sys.modules])'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'

def test_bad_gate_is_named():
    res = subprocess.run([sys.executable, root/'tests'/'gates.py', 'no-such-gate'], capture_output=True, text=True)
    assert res.returncode and 'no-such-gate' in res.stderr and 'notebooks' in res.stderr

def test_outputs_name_no_machine():
    "What a notebook shows is the same on every machine: no warning with the path of an installation, no temporary file."
    found, private = [], 'site-packages|tmp|home|root'
    for nb in books:
        for c in json.loads(nb.read_text(encoding='utf-8'))['cells']:
            shown = json.dumps([o for o in c.get('outputs', ()) if 'text' in o])
            if hit := re.search(rf'\S*/({private})/\S*', shown): found.append(f'{nb.name}: {hit[0][:80]}')
    assert not found, '\n'.join(found)

def test_links_between_files_lead_somewhere():
    "Every relative link of README, CONTRIBUTING, CHANGELOG and of the notebooks' prose names a file that exists."
    dead = []
    texts = {o: o.read_text(encoding='utf-8') for o in root.glob('*.md')}
    texts |= {nb: '\n'.join(cells(nb, 'markdown')) for nb in books}
    for path, text in texts.items():
        for link in re.findall(r'\]\(([^)#\s]+)[^)]*\)', re.sub(r'```.*?```|`[^`\n]*`', '', text, flags=re.S)):
            if re.match(r'[a-z]+:', link): continue
            if not (path.parent/link).exists(): dead.append(f'{path.relative_to(root)}: {link}')
    assert not dead, '\n'.join(dead)
