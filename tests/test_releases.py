"""The releases of diffusers that settings.ini claims, older than the one that constraints.txt pins: each runs the tests of the hub.

The differences themselves are known in one place, `aquatic_nb/hub.py` ("The backend" in its notebook). `python -m pytest -m slow tests/test_releases.py`; needs the package index.
"""
import os, re, subprocess, sys
from pathlib import Path

import pytest

root = Path(__file__).resolve().parents[1]
OLDER = ('0.40.0', '0.41.0')

def test_the_oldest_release_is_the_one_that_is_claimed():
    assert re.search(r'\bdiffusers>=([\d.]+)', (root/'settings.ini').read_text())[1] == OLDER[0].rpartition('.')[0]

@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize('version', OLDER)
def test_the_hub_on_an_older_diffusers(tmp_path, version):
    install = [sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps', '--target', tmp_path, f'diffusers=={version}']
    got = subprocess.run([str(o) for o in install], capture_output=True, text=True)
    if got.returncode: pytest.skip(f'pip cannot get diffusers {version}: {got.stderr.strip().splitlines()[-1][:200]}')
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(tmp_path), str(root)]), 'HF_HUB_OFFLINE': '1'}
    told = subprocess.run([sys.executable, '-c', 'import diffusers; print(diffusers.__version__)'], env=env, capture_output=True, text=True)
    assert told.stdout.strip() == version, told.stderr
    run = subprocess.run([sys.executable, '-m', 'pytest', '-q', 'tests/test_hub.py'], cwd=root, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:]
