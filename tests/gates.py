"""The gates, in order. `python tests/gates.py` runs all; `python tests/gates.py export ruff` runs some; `--list` names them."""
import argparse, hashlib, json, os, re, shutil, subprocess, sys, tempfile, time
from pathlib import Path

root = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
NOTEBOOK_MINUTES, PYTEST_MINUTES = 30, 30 # a run that takes longer than this hangs
env = {**os.environ, 'OMP_NUM_THREADS': '1', 'MKL_NUM_THREADS': '1', 'MPLBACKEND': 'agg', 'PYTHONUNBUFFERED': '1',
       'HF_HUB_OFFLINE': '1', 'PATH': f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}"}

class GateError(Exception): "A gate that is shut; the message says what to do."

def run(*cmd, minutes=5, capture=False, cwd=root, **kw):
    "Run a command of this environment; anything but success is a `GateError`."
    cmd = [str(o) for o in cmd]
    try: res = subprocess.run(cmd, cwd=cwd, env={**env, **kw}, timeout=60*minutes, text=True,
                              stdout=subprocess.PIPE if capture else None, stderr=subprocess.STDOUT if capture else None)
    except subprocess.TimeoutExpired as e:
        out = e.stdout or ''
        print(out[-4000:] if isinstance(out, str) else out.decode(errors='replace')[-4000:])
        raise GateError(f"`{' '.join(cmd[:4])}` did not end within {minutes} minutes") from None
    if res.returncode:
        if capture: print(res.stdout[-8000:])
        raise GateError(f"`{' '.join(cmd[:4])}` ended with code {res.returncode}")
    return res.stdout or ''

def notebooks():
    "Every notebook of the book, as nbdev finds them."
    return sorted(o for o in (root/'nbs').rglob('*.ipynb') if not any(p[0] in '._' for p in o.relative_to(root/'nbs').parts))

def snapshot(*globs):
    "Name and digest of every file that matches."
    return {str(o.relative_to(root)): hashlib.sha256(o.read_bytes()).hexdigest() for g in globs for o in sorted(root.glob(g)) if o.is_file()}

def unchanged(before, after, what):
    "Raise where two snapshots differ."
    changed = sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))
    if changed: raise GateError(f"{what} changed {', '.join(changed)}; commit the result")

def clean_checkout():
    "Nothing is changed or untracked (an error in CI, a remark elsewhere)."
    if not (root/'.git').exists(): return 'no git here'
    out = subprocess.run(['git', 'status', '--porcelain'], cwd=root, text=True, capture_output=True).stdout.strip()
    if out and os.environ.get('CI'): raise GateError(f'the checkout is not clean:\n{out}')
    return f"{len(out.splitlines())} files differ from the commit" if out else 'clean'

def clean():
    "`nbdev_clean` finds nothing to clean."
    before = snapshot('nbs/**/*.ipynb')
    run(BIN/'nbdev_clean', minutes=3)
    unchanged(before, snapshot('nbs/**/*.ipynb'), 'nbdev_clean')
    return f'{len(before)} notebooks'

def export():
    "`nbdev_export` finds nothing to export."
    before = snapshot('aquatic_nb/**/*.py')
    run(BIN/'nbdev_export', minutes=3)
    unchanged(before, snapshot('aquatic_nb/**/*.py'), 'nbdev_export')
    return f'{len(before)} modules'

def readme():
    "README.md is what index.ipynb says."
    run(BIN/'python', root/'tools'/'readme.py', '--check', minutes=1)

def ruff():
    "No undefined or unused name, no star import."
    run(BIN/'ruff', 'check', '--no-cache', '--quiet', 'aquatic_nb', 'tests', 'tools', 'setup.py', minutes=1)

def notebook_tests():
    "Every notebook runs, and says what it says in its file."
    out = run(BIN/'python', root/'tests'/'outputs.py', '--workers', 2, minutes=NOTEBOOK_MINUTES, capture=True)
    missing = [o.name for o in notebooks() if f'- {o.relative_to(root)}: ' not in out]
    if missing: raise GateError(f"tests/outputs.py did not run {', '.join(missing)}:\n{out[-4000:]}")
    slowest = ', '.join(re.findall(r'^\S+\.ipynb: \d+ secs', out, re.M)[:4])
    return f'{len(notebooks())} notebooks; slowest: {slowest}'

def docs():
    "The site builds, with every page and no dead link."
    return run(BIN/'python', root/'tools'/'docs.py', minutes=15, capture=True).strip().splitlines()[-1]

_TRY = '''
import importlib, json, pathlib, pkgutil, sys
import aquatic_nb
home = pathlib.Path(aquatic_nb.__file__).parent
names = sorted(m.name.partition('.')[2] for m in pkgutil.walk_packages([str(home)], 'aquatic_nb.')
               if not m.ispkg and not m.name.rpartition('.')[2].startswith('_'))
for name in names: importlib.import_module(f'aquatic_nb.{name}')
files = [str(o.relative_to(home)) for o in (home/'assets').rglob('*') if o.is_file()] if (home/'assets').exists() else []
print(json.dumps(dict(home=str(home), names=names, assets=sorted(files))))
'''

def wheel():
    "The wheel holds every module and asset, and works where the checkout is not on the path."
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        src = shutil.copytree(root, tmp/'src', ignore=shutil.ignore_patterns('.*', '_docs', '_proc', '_demo', 'nbs', 'build', 'dist', '*.egg-info', '__pycache__'))
        run(BIN/'python', '-m', 'pip', 'wheel', '--quiet', '--no-deps', '--no-build-isolation', '-w', tmp, src, minutes=3, capture=True)
        whl, = tmp.glob('*.whl')
        run(sys.executable, '-m', 'venv', '--without-pip', tmp/'env', minutes=2)
        py = tmp/'env'/'bin'/'python'
        run(BIN/'python', '-m', 'pip', '--python', py, 'install', '--quiet', '--no-deps', '--no-index', whl, minutes=2)
        site = Path(run(py, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))', capture=True).strip())
        ours = run(BIN/'python', '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))', capture=True).strip()
        (site/'dependencies.pth').write_text(ours) # a path only: .pth files inside it, such as the checkout's, are not read
        told = json.loads(run(py, '-c', _TRY, capture=True, cwd=tmp, PYTHONPATH='').strip().splitlines()[-1])
        check_wheel(told, site)
        script = py.with_name('aquatic')
        if 'cli' in told['names']: run(script, '--help', capture=True, cwd=tmp, PYTHONPATH='', minutes=1)
        return f"{whl.name}, {whl.stat().st_size/2**20:.1f} MiB, {len(told['names'])} modules, {len(told['assets'])} assets"

def check_wheel(told, site):
    "Compare what the installed wheel says with the checkout."
    lib = root/'aquatic_nb'
    names = sorted('.'.join(o.relative_to(lib).with_suffix('').parts) for o in lib.rglob('*.py') if not o.stem.startswith('_'))
    assets = sorted(str(o.relative_to(lib)) for o in (lib/'assets').rglob('*') if o.is_file() and '__pycache__' not in o.parts)
    if not Path(told['home']).is_relative_to(Path(site).resolve()) and not Path(told['home']).is_relative_to(site):
        raise GateError(f"imported from {told['home']}, not from the wheel")
    if told['names'] != names: raise GateError(f"modules of the wheel {told['names']}, of the checkout {names}")
    if told['assets'] != assets: raise GateError(f"assets missing from the wheel: {sorted(set(assets)-set(told['assets']))}")

def pytests():
    "What crosses modules. Last, so that its closing line is."
    run(BIN/'python', '-m', 'pytest', '-q', '-n', 2, '--dist', 'worksteal', '--durations', 15, 'tests', minutes=PYTEST_MINUTES)

GATES = dict(checkout=clean_checkout, clean=clean, export=export, readme=readme, ruff=ruff, notebooks=notebook_tests, docs=docs,
             wheel=wheel, pytest=pytests)

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('gates', nargs='*', metavar='gate', help=f"some of: {' '.join(GATES)} (all)")
    p.add_argument('--list', action='store_true', help='say what each gate checks')
    args = p.parse_args()
    if args.list: return print('\n'.join(f'{k:10} {f.__doc__}' for k, f in GATES.items()))
    unknown = set(args.gates) - GATES.keys()
    if unknown: p.error(f"no gate named {', '.join(sorted(unknown))}; there are {' '.join(GATES)}")
    start = time.time()
    for name in args.gates or GATES:
        print(f'--- {name}: {GATES[name].__doc__}', flush=True)
        t = time.time()
        try: said = GATES[name]()
        except GateError as e: sys.exit(f'gate {name} is shut: {e}')
        if name != 'pytest': print(f'    ok, {time.time()-t:.0f} s' + (f', {said}' if said else '') + f' ({time.time()-start:.0f} s in all)', flush=True)

if __name__ == '__main__': main()
