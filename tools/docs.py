"""The site: nbs/ -> _docs/. `python tools/docs.py` builds and checks it, `--sidebar` only renews nbs/sidebar.yml.

With Quarto on PATH `nbdev_docs` renders; without it smalldocs does, from the same processed notebooks and the same `_quarto.yml`. Either way
each documented symbol gets its signature, its source (folded where it is long) and a table of parameters, errors and methods that folds out below;
formulas use the KaTeX kept in tools/katex, tools/book.js has the search, and every page, link, anchor and picture is checked afterwards.
"""
import ast, functools, importlib, inspect, json, os, posixpath, re, shutil, sys, textwrap, types, typing
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

root = Path(__file__).resolve().parents[1]
os.chdir(root)
sys.path.insert(0, str(root))
os.environ.setdefault('MPLBACKEND', 'agg')

import nbdev.processors, nbdev.quarto, nbdev.serve, nbdev.showdoc
import yaml
from execnb.nbio import mk_cell
from fastcore.docments import DocmentTbl, docstring
from nbdev.config import get_config
from nbdev.process import Processor
from nbdev.processors import FilterDefaults, mv_exports, rm_export

cfg = get_config()
nbs, proc, out = root/'nbs', root/'_proc', root/'_docs'
site_url = f'{cfg.doc_host}{cfg.doc_baseurl}/'

# ---- what is in the book

def pages():
    "Sources of the site's pages below nbs/, in reading order: the index first."
    found = [o.relative_to(nbs) for o in sorted(nbs.rglob('*')) if o.suffix in ('.ipynb', '.qmd') and o.is_file()]
    found = [o for o in found if not any(p[0] in '._' for p in o.parts)]
    number = lambda o: int(o.stem.split('_')[0]) if re.match(r'\d', o.stem) else 10**6
    return sorted(found, key=lambda o: (o.stem != 'index' or len(o.parts) > 1, number(o), str(o)))

def page_name(src):
    "Where a source ends up: numbers leave, as in nbdev's own links (`03_core.ipynb` -> `core.html`)."
    return str(src.with_name(re.sub(r'^\d+[a-z]?_', '', src.stem) + '.html'))

def title(src):
    "A notebook's title: the heading of its first cell."
    path = nbs/src
    if src.suffix == '.ipynb':
        cells = json.loads(path.read_text(encoding='utf-8'))['cells']
        text = next((''.join(c['source']) for c in cells if c['cell_type'] == 'markdown'), '')
    else: text = path.read_text(encoding='utf-8')
    found = re.search(r'^#\s+(.+)$', text, re.M) or re.search(r'^title:\s*"?(.+?)"?\s*$', text, re.M)
    return found[1].strip() if found else src.stem

PARTS = {'theory': 'What is stored', 'models': 'Models to try it on', 'encoder': 'Finding good codes', 'layers': 'Layers that run packed',
         'bits': 'Which layer gets which bits', 'packing': 'The whole model', 'tuning': 'Tuning what is packed', 'files': 'Files', 'door': 'The one call',
         'kernels': 'Making it fast', 'judging': 'Judging it fairly', 'command': 'From the command line'}
TASKS = ('compress', 'words', 'choose_bits', 'tune', 'deploy', 'evaluate', 'format', 'paper') # tutorials in the order of need

def part_title(folder):
    "The name of a part of the book, after its folder: `03_encoder` -> `3 · Finding good codes`; other folders as they are."
    number, _, name = folder.partition('_')
    return f'{int(number)} · {PARTS.get(name, name.capitalize())}' if number.isdigit() else folder.capitalize()

def sidebar():
    "The contents of sidebar.yml: landing page, the tour, tutorials by task, the parts of the book as the folders show them, the reference."
    def entry(o): return {'text': f'{o.stem.split("_")[0]} · {title(o)}' if re.match(r'\d', o.stem) else title(o), 'href': str(o)}
    top = [o for o in pages() if len(o.parts) == 1]
    contents = [{'text': 'Start here', 'href': 'index.ipynb'}, *map(entry, (o for o in top if re.match(r'\d', o.stem)))]
    task = lambda o: TASKS.index(o.stem) if o.stem in TASKS else -1
    for folder in sorted({o.parts[0] for o in pages() if len(o.parts) > 1}, key=lambda o: (o[0].isdigit(), o)):
        inside = sorted((o for o in pages() if o.parts[0] == folder and len(o.parts) > 1), key=task)
        contents.append({'section': part_title(folder), 'contents': [entry(o) for o in inside]})
    other = [entry(o) for o in top if not re.match(r'\d', o.stem) and o.stem not in ('index', 'api')]
    contents.append({'section': 'Reference', 'contents': other + [{'text': 'All functions and classes', 'href': 'api.qmd'}]})
    return yaml.safe_dump({'website': {'sidebar': {'style': 'floating', 'search': False, 'contents': contents}}}, sort_keys=False, allow_unicode=True)

# ---- what a documented symbol looks like

def cell_text(o):
    "Text for a cell of a markdown table."
    return str(o).replace('|', r'\|').replace('\n', ' ')

def code(o):
    "A type or default in code font; nothing for nothing."
    if o in (None, type(None)) or getattr(o, '__name__', '') == '_empty': return ''
    if typing.get_origin(o) is typing.Annotated: o = o.__origin__
    name = o if isinstance(o, str) else o.__name__ if isinstance(o, type) and not hasattr(o, '__args__') else str(o)
    name = re.sub(r'^<(?:function|class) \W*([\w.]+).*', r'\1', name)
    name = re.sub(r'\bOptional\[([\w.]+)\]', r'\1 | None', name.replace('typing.', ''))
    name = re.sub(r'\b(?:pathlib|torch|collections\.abc|aquatic_nb\.\w+)\.(?=[A-Z])', '', name)
    return f'`{cell_text(name)}`'

def meaning(d):
    "What the comment behind a parameter says, or the help of a command line's option."
    said = d.get('docment')
    if said is None or getattr(said, '__name__', '') == '_empty': said = next((o.help for o in getattr(d.get('anno'), '__metadata__', ()) if getattr(o, 'help', None)), '')
    return cell_text(said)

def behind(sym, name):
    "The comment behind a parameter in the source, where docments do not look: `**more`, an `__init__` that a base class hides; behind a `def` of one line."
    try: text = inspect.getsource(sym)
    except (OSError, TypeError): return ''
    found = re.search(rf'^\s*(?:def )?\**{re.escape(name)}\b[^#\n]*#\s*(?!\|)(.+)$', text, re.M)
    return cell_text(found[1].strip()) if found else ''

def message(node):
    "The text of an error as its source has it: names of values in angle marks, other expressions as dots."
    match node:
        case ast.Constant(value=str(text)): return text
        case ast.JoinedStr(values=parts): return ''.join(message(o) for o in parts)
        case ast.FormattedValue(value=ast.Name(id=name)): return f'‹{name}›'
        case ast.BinOp(left=left, op=ast.Add(), right=right): return message(left) + message(right)
        case ast.IfExp(body=body): return message(body)
    return '…'

def source_tree(sym):
    "Syntax tree of a function or class; None where there is no source."
    try: return ast.parse(textwrap.dedent(inspect.getsource(sym)))
    except (OSError, TypeError, SyntaxError): return None

def errors(sym):
    "(type, message) of what a function or class raises, by itself or through the checks of its module that it calls."
    tree, found = source_tree(sym), {}
    if tree is None: return []
    around = vars(sys.modules.get(getattr(sym, '__module__', None)) or types)
    called = [around.get(o.func.id) for o in ast.walk(tree) if isinstance(o, ast.Call) and isinstance(o.func, ast.Name) and re.match('_|check', o.func.id)]
    checks = [source_tree(o) for o in dict.fromkeys(called) if isinstance(o, types.FunctionType) and o is not sym]
    for o in (o for t in (tree, *checks) if t for o in ast.walk(t)):
        match o:
            case ast.Raise(exc=ast.Call(func=ast.Name(id=kind), args=[first, *_])) if kind.endswith('Error') and kind != 'AssertionError': found[kind, message(first)] = None
    return [o for o in found if o[1].strip('…‹›: ')]

def error_rows(sym):
    "Rows of the parameter table for the errors, all of them."
    plain = lambda text: re.sub(r'([\\*_`$\[\]<>~^])', r'\\\1', cell_text(text)).replace('\\\\|', '\\|')
    return [['*raises*', code(kind), '', plain(text)] for kind, text in errors(sym)]

def param_table(sym):
    "Name, type, default and meaning of each parameter, what comes back and what is raised, as a markdown table; '' for nothing to tell."
    try: table = DocmentTbl(sym)
    except (TypeError, ValueError): return ''
    said = lambda o: '' if getattr(o, '__name__', '') == '_empty' or o is None else cell_text(o)
    rows, shown = [], params_of(sym)
    for name in shown:
        d = table.dm.get(name)
        d = d or {}
        default = d.get('default')
        given = 'default' in d and getattr(default, '__name__', '') != '_empty'
        rows.append([f'**{cell_text(shown[name]).replace("*", chr(92)+"*")}**', kind(sym, name, d), code(repr(default) if not callable(default) else default) if given else '', meaning(d) or behind(sym, name)])
    ret = table.dm.get('return', {}) if table.returns else {}
    if any(said(ret.get(k)) for k in ('anno', 'docment')): rows.append(['*returns*', code(ret.get('anno')), '', said(ret.get('docment'))])
    rows += error_rows(sym)
    if not rows: return ''
    head = ['', 'type', 'default', '']
    kept = [i for i in range(4) if not i or any(r[i] for r in rows)] # no empty columns
    lines = [f"| {' | '.join(r[i] for i in kept)} |" for r in (head, ['---']*4, *rows)]
    return '\n'.join(lines) + '\n'

def methods(cls):
    "(name, function, whether it is a property) of the public methods that a class defines itself, and of its call."
    for name, o in vars(cls).items():
        f = o.fget if isinstance(o, property) else getattr(o, '__func__', o)
        if isinstance(f, types.FunctionType) and (name[0] != '_' or name == '__call__') and name != 'extra_repr': yield name, f, isinstance(o, property)

def method_table(cls):
    "The public methods of a class, each with its signature, what it does and what its parameters mean; '' where there are none."
    rows = []
    for name, f, is_property in methods(cls):
        called = name if is_property else f'{"" if name == "__call__" else name}({signature(f)})'
        said = [cell_text((f.__doc__ or '').strip().split('\n\n')[0]) or behind(f, name)]
        try: table = DocmentTbl(f).dm
        except (TypeError, ValueError): table = {}
        said += [f'**{o}**: {meaning(table[o])}' for o in params_of(f) if o in table and meaning(table[o])]
        shown = called if called[0] != '(' else f'{cls.__name__}.__call__{called}'
        rows.append(f"| `{cell_text(shown)}` | {'<br>'.join(o for o in said if o)} |")
    return '\n'.join(['| method | what it does |', '|---|---|', *rows]) + '\n' if rows else ''

def folded(summary, body):
    "Markdown that folds out."
    return f'::: {{.params}}\n\n<details><summary>{summary}</summary>\n\n{body}\n</details>\n\n:::\n' if body else ''

def signature(sym):
    "Parameters with their stars and defaults, as one writes them; '' where there is no signature."
    try: found = [p for p in inspect.signature(sym).parameters.values() if p.name not in ('self', 'cls')]
    except (TypeError, ValueError): return ''
    def default(o):
        text = o if isinstance(o, str) and not isinstance(o, type) else getattr(o, '__name__', None) or repr(o)
        text = repr(o) if isinstance(o, str) else str(text)
        return text if len(text) < 40 and '<' not in text else '...'
    said, bare = [], False
    for p in found:
        if p.kind is p.KEYWORD_ONLY and not bare and not any(o.kind is o.VAR_POSITIONAL for o in found): said.append('*'); bare = True
        said.append(star(p) + p.name + ('' if p.default is p.empty else f'={default(p.default)}'))
    return ', '.join(said)

def star(p): return {p.VAR_POSITIONAL: '*', p.VAR_KEYWORD: '**'}.get(p.kind, '')

def kind(sym, name, d):
    "A parameter's type: as annotated, else that of a number or flag it defaults to. The type of None or of 'auto' would mislead."
    try: p = inspect.signature(sym).parameters.get(name)
    except (TypeError, ValueError): p = None
    known = p is None or p.annotation is not p.empty or isinstance(p.default, (bool, int, float))
    return code(d.get('anno')) if known else ''

def params_of(sym):
    "Parameters of a function or class that are worth naming, with their stars; none where there is no signature."
    try: found = inspect.signature(sym).parameters.values()
    except (TypeError, ValueError): return {}
    return {p.name: star(p) + p.name for p in found if p.name not in ('self', 'cls')}

class TableRenderer(nbdev.showdoc.BasicMarkdownRenderer):
    "Heading, signature with defaults and docstring of the exported symbol; what folds out is in `table_of`."
    module = None # of the notebook in work

    def _repr_markdown_(self):
        sym = getattr(self.module, self.nm, None) or self.sym # a patched method leaves None behind
        patched = getattr(self.module, self.nm, None) is None and '.' not in self.nm
        owners = [o for o in vars(self.module).values() if patched and isinstance(o, type) and o.__module__ == self.module.__name__ and self.nm in vars(o)]
        owner = owners[0] if len(owners) == 1 else None
        sym = vars(owner)[self.nm] if owner else sym
        name = f'{owner.__name__}.{self.nm}' if owner else self.nm # of a patched method below another decorator
        called = f"`{name}({signature(sym)})`{{.signature}}" if callable(sym) else ''
        doc = f"{'#'*self.title_level} {name}\n\n"
        return doc + '\n\n'.join(o for o in (called, self.docs or '') if o)

def table_of(module, name):
    "What folds out below a symbol's source: parameters, what comes back, all errors, methods."
    sym = functools.reduce(lambda o, part: getattr(o, part, None), name.split('.'), module)
    if sym is None: return ''
    many = 'parameters, methods and errors' if isinstance(sym, type) else 'parameters and errors'
    return folded(f'{name}: {many}', '\n'.join(o for o in (param_table(sym), method_table(sym) if isinstance(sym, type) else '') if o))

FOLDED_FROM = 26 # lines of a cell that folds; the comments behind parameters count

def fold_export(cell):
    "Keep an exported cell as source, which folds out where it is long; drop cells that only import, configure or are hidden."
    flags = cell.directives_.keys() & {'export', 'exporti', 'hide', 'default_exp'}
    if not flags: return
    body = [] if 'hide' in flags or 'default_exp' in flags else ast.parse(cell.source).body
    if all(isinstance(o, (ast.Import, ast.ImportFrom)) for o in body): del cell['source']; return
    names = [o.name for o in body if hasattr(o, 'name')]
    lines = [o for o in cell.source.splitlines() if o.strip() and not o.startswith('#|')]
    if len(lines) >= FOLDED_FROM: cell.source = f'#| code-fold: true\n#| code-summary: "source{": " if names else ""}{", ".join(names)} ({len(lines)} lines)"\n{cell.source}'

class source_last(Processor):
    "Put the source below the names, in its own order, of what it defines, and the tables below the source."
    def begin(self):
        cells, out = self.nb.cells, []
        while cells:
            cell, shown = cells.pop(0), []
            while cells and getattr(cells[0], 'has_sd', False): shown.append(cells.pop(0))
            names = [o.source.strip()[len('show_doc('):-1] for o in reversed(shown)] # nbdev puts the last one first
            tables = [table_of(TableRenderer.module, o) for o in names] if TableRenderer.module else []
            out += [*reversed(shown), cell, *(mk_cell(o, 'markdown') for o in tables if o)]
        cells[:] = out

def needed(cell):
    "Whether `show_doc` needs a cell: exported ones, imports alone, and `show_doc` itself. Examples that also import are not run again."
    if cell.cell_type != 'code' or not cell.source or 'nbdev_export(' in cell.source or cell.directives_.get('eval:', [''])[0] == 'false': return False
    if cell.directives_.keys() & {'export', 'exports', 'exporti', 'exec_doc'}: return True
    trees = cell.parsed_() or []
    return any(nbdev.processors._show_docs([t]) for t in trees) or bool(trees) and all(isinstance(t, (ast.Import, ast.ImportFrom)) for t in trees)

class BookProcs(FilterDefaults):
    "nbdev's processors, with source that folds out instead of vanishing."
    def base_procs(self):
        swap = {rm_export: fold_export, mv_exports: source_last}
        return [swap.get(o, o) for o in super().base_procs()]

    def __call__(self, nb):
        name = nbdev.processors._default_exp(nb)
        TableRenderer.module = importlib.import_module(f'aquatic_nb.{name}') if name else None
        return super().__call__(nb)

def anchor(name):
    "The id that a heading gets."
    return name.lower().lstrip('_')

def explained(cache, nb):
    "The names that a processed notebook has a heading for."
    cells = json.loads((cache/nb).read_text(encoding='utf-8'))['cells']
    said = [''.join(o.get('data', {}).get('text/markdown', '')) for c in cells for o in c.get('outputs', [])]
    return {m for o in said for m in re.findall(r'^#+ ([\w.]+)$', o, re.M)}

def api_page(cache):
    "One line for every public function and class of every module, linked to where it is explained; stops where one is not."
    lines = ['---', 'title: All functions and classes', 'subtitle: "Every public function and class, by module, linked to its parameters, shapes and errors"', '---', '']
    silent = []
    for nb in [o for o in pages() if re.match(r'\d', o.stem)]:
        cells = [''.join(c['source']) for c in json.loads((nbs/nb).read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code']
        found = re.search(r'#\|\s*default_exp\s+(\S+)', '\n'.join(cells))
        if not found: continue
        name = found[1]
        mod = importlib.import_module(f'aquatic_nb.{name}')
        lines += [f'## aquatic_nb.{name}', '', f'[{title(nb)}]({nb})' + (f': {cell_text(mod.__doc__.strip())}' if mod.__doc__ else ''), '', '::: {.api}', '', '| | |', '|---|---|']
        headings = explained(cache, nb)
        for sym in mod.__all__:
            doc = (docstring(getattr(mod, sym)) or '').strip() if callable(getattr(mod, sym, None)) else ''
            if sym in headings: lines.append(f"| [`{sym}`]({nb}#{anchor(sym)}) | {cell_text(doc.splitlines()[0]) if doc else ''} |")
            elif isinstance(getattr(mod, sym), (type, types.FunctionType)) and getattr(mod, sym).__module__ == mod.__name__: silent.append(f'{name}.{sym}')
        lines += ['', ':::', '']
    if silent: raise SystemExit(f'docs: without an entry in the reference: {", ".join(silent)}')
    return '\n'.join(lines)

# ---- building

_proc_nbs = nbdev.serve.proc_nbs

def process(path='', **kw):
    "Process every notebook, in this process so that the changes above hold, and add the generated page."
    shutil.rmtree(proc, ignore_errors=True)
    cache = _proc_nbs(path, n_workers=0, force=False)
    done = {str(o.relative_to(cache)) for o in cache.rglob('*.ipynb')}
    missing = [str(o) for o in pages() if o.suffix == '.ipynb' and str(o) not in done]
    if missing: raise SystemExit(f'docs: not processed: {", ".join(missing)}')
    (cache/'api.qmd').write_text(api_page(cache), encoding='utf-8')
    for o in nbs.rglob('*'): # pictures and styles that nbdev leaves behind
        to = cache/o.relative_to(nbs)
        if o.is_file() and o.suffix in ('.png', '.svg', '.jpg', '.css', '.yml') and not to.exists():
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(o, to)
    return cache

def strip_numbers(cache):
    "Give processed notebooks the names that nbdev's links expect, and follow the renaming in their links and in the sidebar."
    renamed = {str(o): str(Path(page_name(o)).with_suffix(o.suffix)) for o in pages()}
    link = lambda text: re.sub(r'(\]\((?:\.\./)*(?:[\w-]+/)*)\d+[a-z]?_([\w-]+\.(?:ipynb|qmd|html))', r'\1\2', text)
    for o in cache.rglob('*.ipynb'):
        nb = json.loads(o.read_text(encoding='utf-8'))
        for c in nb['cells']:
            if c['cell_type'] == 'markdown': c['source'] = link(''.join(c['source']))
        o.write_text(json.dumps(nb), encoding='utf-8')
    for o in cache.glob('*.qmd'): o.write_text(link(o.read_text(encoding='utf-8')), encoding='utf-8')
    side = (cache/'sidebar.yml').read_text(encoding='utf-8')
    for old, new in renamed.items():
        if old == new: continue
        (cache/old).rename(cache/new)
        side = re.sub(rf'href: {re.escape(old)}\b', f'href: {new}', side)
    (cache/'sidebar.yml').write_text(side, encoding='utf-8')

def themes(cache):
    "Bootstrap as it comes for light, and with its own dark colours at the top for dark: no fonts from elsewhere."
    import smalldocs
    css = (Path(smalldocs.__file__).parent/'assets'/'vendor'/'bootstrap'/'bootstrap.min.css').read_text(encoding='utf-8')
    (cache/'light.css').write_text(css, encoding='utf-8')
    (cache/'dark.css').write_text(css.replace('[data-bs-theme=dark]{', ':root,[data-bs-theme=dark]{', 1), encoding='utf-8')

def build_smalldocs():
    "Render with smalldocs."
    from smalldocs.site import build
    nbdev.quarto.refresh_quarto_yml()
    cache = process()
    strip_numbers(cache)
    themes(cache)
    site = build(cache, quiet=True)
    bad = [w for w in site.warnings if 'broken link' in w]
    known = ('output-file is not read', 'html-math-method is ignored') # Quarto's; done here by strip_numbers and finish
    for w in site.warnings:
        if not any(k in w for k in known): print(f'docs: {w}', file=sys.stderr)
    if bad: raise SystemExit(f'docs: {len(bad)} broken links')
    shutil.rmtree(out, ignore_errors=True)
    shutil.move(site.out, out)
    shutil.rmtree(proc)

def build_quarto():
    "Render with Quarto, as `nbdev_docs` does."
    nbdev.quarto.proc_nbs = process
    if (root/'README.md').exists(): (root/'README.md').touch() # ours comes from tools/readme.py
    nbdev.quarto.nbdev_docs.__wrapped__()

def written_in(src):
    "A line that says where a page is written: its notebook and module in the repository."
    text = (nbs/src).read_text(encoding='utf-8')
    found = re.search(r'#\|\s*default_exp\s+([\w.]+)', text) if src.suffix == '.ipynb' else None
    link = lambda o: f'<a href="{repository()}/blob/{cfg.branch}/{o}">{o}</a>'
    module = ' · module ' + link('aquatic_nb/' + found[1].replace('.', '/') + '.py') if found else ''
    return f'<p class="written-in">notebook {link(f"nbs/{src.as_posix()}")}{module}</p>'

def repository(): return f'https://github.com/{cfg.user}/{cfg.repo}'

def unlisted():
    "(page, anchor) of names that rooms share, `#| exporti`: they have no entry in the reference."
    found = set()
    for nb in [o for o in pages() if re.match(r'\d', o.stem)]:
        name = re.search(r'#\|\s*default_exp\s+([\w.]+)', (nbs/nb).read_text(encoding='utf-8'))
        mod = name and importlib.import_module(f'aquatic_nb.{name[1]}')
        found |= {(out/page_name(nb), anchor(o)) for o in (vars(mod) if mod else ()) if o not in mod.__all__}
    return found

def unlink(page, text, known, silent):
    "A page without links to private and unlisted names, unless there is such a heading."
    def link(m):
        to = (page.parent/m[1]).resolve() if m[1] else page
        return m[3] if m[2].startswith('_') or (to, m[2]) in silent and m[2] not in known.get(to, ()) else m[0]
    return re.sub(r'<a href="([^"#:]*)#([^"]*)"[^>]*>(.*?)</a>', link, text)

def finish():
    "Make every page independent of the network: our KaTeX, relative links, a search that works from the disk too."
    index = out/'search.json'
    if index.exists(): (out/'site_libs'/'search-index.js').write_text(f"window.searchIndex = {index.read_text(encoding='utf-8')};\n", encoding='utf-8')
    script = out/'site_libs'/'smalldocs.js'
    if script.exists(): script.write_text((root/'tools'/'book.js').read_text(encoding='utf-8') + script.read_text(encoding='utf-8'), encoding='utf-8')
    shutil.copytree(root/'tools'/'katex', out/'site_libs'/'katex', dirs_exist_ok=True)
    silent, known = unlisted(), {o: set(re.findall(r' id="([^"]+)"', o.read_text(encoding='utf-8'))) for o in out.rglob('*.html')}
    sources = {out/page_name(o): o for o in pages()}
    for page in out.rglob('*.html'):
        up = '../' * (len(page.relative_to(out).parts)-1)
        text = page.read_text(encoding='utf-8')
        text = re.sub(r'https://cdn\.jsdelivr\.net/npm/katex@[^/"]*/dist(?:/contrib)?/', f'{up}site_libs/katex/', text)
        if page in sources: text = re.sub(r'</header>(?!.*</header>)', lambda m: f'{written_in(sources[page])}\n</header>', text, count=1, flags=re.S)
        page.write_text(unlink(page, text.replace(site_url, up), known, silent), encoding='utf-8')

# ---- checking

class Links(HTMLParser):
    "The ids of a page, what it links to, and what it loads."
    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.loads, self.silent = set(), [], [], []
        self.feed(text)
    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        if a.get('id'): self.ids.add(a['id'])
        if tag == 'a' and a.get('name'): self.ids.add(a['name'])
        if tag == 'a' and a.get('href'): self.links.append(a['href'])
        if tag == 'img' and len((a.get('alt') or '').split()) < 3: self.silent.append((a.get('src') or '')[:40])
        if tag in ('img', 'script', 'source', 'iframe') and a.get('src'): self.loads.append(a['src'])
        if tag == 'link' and a.get('href') and a.get('rel') not in ('canonical', 'alternate', 'next', 'prev'): self.loads.append(a['href'])

def check():
    "All pages are there, every link and anchor leads somewhere, every picture is told in words, nothing is loaded from elsewhere."
    found = {o.relative_to(out).as_posix(): Links(o.read_text(encoding='utf-8')) for o in out.rglob('*.html')}
    wanted = {page_name(o) for o in pages()} | {'api.html'}
    problems = [f'no page {o}' for o in sorted(wanted - found.keys())]
    for name, page in found.items():
        problems += [f'{name}: a picture without words, give its cell `#| fig-alt:` or its link a text: {o}' for o in page.silent]
        for url in page.loads + page.links:
            u = urlsplit(url)
            if u.scheme in ('http', 'https') or url.startswith('//'):
                if url in page.loads: problems.append(f'{name} loads {url}')
            elif not u.scheme:
                target = posixpath.normpath(posixpath.join(posixpath.dirname(name), unquote(u.path))) if u.path else name
                if (out/target).is_dir(): target = posixpath.normpath(f'{target}/index.html')
                if target.startswith('..') or not (out/target).exists(): problems.append(f'{name}: no file {url}')
                elif u.fragment and target in found and unquote(u.fragment) not in found[target].ids | {'top'}: problems.append(f'{name}: no anchor {url}')
    if problems: raise SystemExit('docs: ' + '\ndocs: '.join(problems))
    size = sum(o.stat().st_size for o in out.rglob('*') if o.is_file()) / 2**20
    return f'{len(found)} pages, {sum(len(o.links) for o in found.values())} links, {size:.1f} MiB in {out.name}/index.html'

def main():
    (nbs/'sidebar.yml').write_text(sidebar(), encoding='utf-8')
    if '--sidebar' in sys.argv: return
    nbdev.serve.FilterDefaults = BookProcs
    nbdev.processors._do_eval = needed
    nbdev.showdoc.BasicMarkdownRenderer = TableRenderer
    build_quarto() if shutil.which('quarto') else build_smalldocs()
    finish()
    print(check())

if __name__ == '__main__': main()
