"""The documentation site in a real browser: no console errors, nothing from the network, formulas and pictures seen, search finds, phones fit.

Chromium is driven through its debugging pipe, which needs nothing but the standard library.
"""
import contextlib, fcntl, functools, http.server, importlib.util, json, os, re, select, shutil, subprocess, sys, tempfile, threading, time
from pathlib import Path
import pytest

root = Path(__file__).resolve().parents[1]
out = root/'_docs'
chromium = next((o for o in map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome')) if o), None)
FLAGS = ('--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update '
         '--disable-sync --disable-dev-shm-usage --remote-debugging-pipe').split()

def stale():
    "Whether the site is missing, or older than what it is made from."
    if not (out/'index.html').exists(): return True
    made = (out/'index.html').stat().st_mtime
    sources = [o for o in [*(root/'nbs').rglob('*'), root/'tools'/'docs.py'] if o.is_file() and o.name not in ('sidebar.yml', 'nbdev.yml')]
    return any(o.stat().st_mtime > made for o in sources if o.suffix != '.failed')

@pytest.fixture(scope='module')
def site():
    "The built site; built now where it is missing or old."
    if importlib.util.find_spec('smalldocs') is None and not shutil.which('quarto'): pytest.skip('neither quarto nor smalldocs is installed')
    if stale(): subprocess.run([sys.executable, root/'tools'/'docs.py'], check=True, timeout=280)
    return out

class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args): return

@pytest.fixture(scope='module')
def url(site):
    "Address of a server on this machine that serves the site."
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_address[1]}/'
    server.shutdown()

class Browser:
    "One tab of a headless chromium."
    def __init__(self, profile):
        to_r, self.to = os.pipe()
        self.frm, frm_w = os.pipe()
        r, w = (fcntl.fcntl(o, fcntl.F_DUPFD, 20) for o in (to_r, frm_w))
        def wire(): os.dup2(r, 3); os.dup2(w, 4)
        self.proc = subprocess.Popen([chromium, *FLAGS, f'--user-data-dir={profile}', 'about:blank'], preexec_fn=wire, pass_fds=(3, 4),
                                     stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for o in (to_r, frm_w, r, w): os.close(o)
        self.n, self.buffer, self.events, self.session = 0, b'', [], None
        target = self.call('Target.createTarget', url='about:blank')['targetId']
        self.session = self.call('Target.attachToTarget', targetId=target, flatten=True)['sessionId']
        for domain in ('Page', 'Runtime', 'Log', 'Network'): self.call(f'{domain}.enable')

    def read(self, until):
        "The next message."
        while b'\0' not in self.buffer:
            if not select.select([self.frm], [], [], max(0, until-time.time()))[0]: raise TimeoutError('chromium does not answer')
            got = os.read(self.frm, 1 << 16)
            if not got: raise EOFError('chromium has gone')
            self.buffer += got
        message, self.buffer = self.buffer.split(b'\0', 1)
        return json.loads(message)

    def call(self, method, timeout=40, **params):
        "One command and its result; what else is said is kept in `events`."
        self.n += 1
        told = dict(id=self.n, method=method, params=params, **({'sessionId': self.session} if self.session else {}))
        os.write(self.to, json.dumps(told).encode() + b'\0')
        until = time.time() + timeout
        while True:
            m = self.read(until)
            if m.get('id') == self.n:
                assert 'error' not in m, (method, m['error'])
                return m['result']
            self.events.append(m)

    def go(self, url):
        "Load a page, and wait until it is."
        self.events.clear()
        self.call('Page.navigate', url=url)
        until = time.time() + 40
        while not any(m.get('method') == 'Page.loadEventFired' for m in self.events): self.events.append(self.read(until))
        self.js('new Promise(done => requestAnimationFrame(() => setTimeout(done, 60)))')

    def js(self, expression):
        "The value of a JavaScript expression, promises awaited."
        res = self.call('Runtime.evaluate', expression=expression, awaitPromise=True, returnByValue=True)
        assert 'exceptionDetails' not in res, res
        return res['result'].get('value')

    def size(self, width, height): self.call('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1, mobile=width < 600)

    def dark(self, on): self.call('Emulation.setEmulatedMedia', features=[dict(name='prefers-color-scheme', value='dark' if on else 'light')])

    def shot(self, path):
        "A picture of what is seen, for a person to look at."
        import base64
        Path(path).write_bytes(base64.b64decode(self.call('Page.captureScreenshot')['data']))

    def complaints(self, home):
        "Errors in the console, failed requests, and requests that leave this machine."
        for m in self.events:
            p = m.get('params', {})
            if m.get('method') == 'Runtime.exceptionThrown': yield p['exceptionDetails'].get('text', '') + str(p['exceptionDetails'].get('exception', ''))[:300]
            if m.get('method') == 'Runtime.consoleAPICalled' and p['type'] == 'error': yield str(p['args'])[:300]
            if m.get('method') == 'Log.entryAdded' and p['entry']['level'] == 'error' and 'favicon' not in p['entry'].get('url', ''): yield f"{p['entry']['text']} {p['entry'].get('url', '')}"
            if m.get('method') == 'Network.requestWillBeSent' and not p['request']['url'].startswith((home, 'data:', 'blob:')): yield f"asked for {p['request']['url']}"

    def close(self):
        with contextlib.suppress(OSError, TimeoutError, EOFError): self.session = None; self.call('Browser.close', timeout=10)
        try: self.proc.wait(10)
        except subprocess.TimeoutExpired: self.proc.kill(); self.proc.wait()
        for o in (self.to, self.frm): os.close(o)

@pytest.fixture(scope='module')
def browser():
    if chromium is None: pytest.skip('chromium is not installed')
    profile = tempfile.mkdtemp()
    tab = Browser(profile)
    yield tab
    tab.close()
    shutil.rmtree(profile, ignore_errors=True)

def pages(site): return sorted(str(o.relative_to(site)) for o in site.rglob('*.html'))

LOOK = '''(() => {
  const prose = [...document.querySelectorAll('main p, main li, main td, main h1, main h2, main h3, main figcaption')];
  const text = o => { if (!/[$\\\\]/.test(o.textContent)) return ''; const c = o.cloneNode(true); c.querySelectorAll('code, pre, .katex, .math').forEach(k => k.remove()); return c.textContent };
  const lum = c => { const [r, g, b] = c.match(/[\\d.]+/g).map(v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126*r + .7152*g + .0722*b };
  const ground = o => { for (; o; o = o.parentElement) { const c = getComputedStyle(o).backgroundColor; if (c.startsWith('rgb(')) return c } return getComputedStyle(document.documentElement).backgroundColor };
  const contrast = o => { const [a, b] = [lum(getComputedStyle(o).color), lum(ground(o))].sort((x, y) => y - x); return (a + .05) / (b + .05) };
  const seen = o => { const b = o.getBoundingClientRect(); return b.width > 4 && b.height > 4 };
  const kinds = new Map(); // one of each kind is looked at
  for (const o of document.querySelectorAll('main p, main td, main th, main h1, main h2, main h3, main pre, main pre span[class], main summary, #quarto-sidebar a, #TOC a')) {
    const kind = [o.tagName, o.className, o.parentElement.tagName, o.parentElement.className].join();
    if (!kinds.has(kind) && o.textContent.trim() && o.offsetParent) kinds.set(kind, o);
  }
  const inked = [...kinds.values()];
  return {
  heading: (document.querySelector('h1') || {}).innerText || '',
  formulas: document.querySelectorAll('main .math').length,
  shown: [...document.querySelectorAll('main .math .katex')].filter(o => !o.offsetParent || seen(o)).length,
  wrong: [...document.querySelectorAll('.katex-error')].map(o => o.title + ' in ' + o.innerText),
  raw: prose.filter(o => /\\$\\$|\\\\(frac|sum|hat|le)\\b|\\$[A-Za-z\\\\][^$\\s]*\\$/.test(text(o))).map(o => o.innerText.slice(0, 80)),
  broken: [...document.images].filter(o => !(o.complete && o.naturalWidth && seen(o))).map(o => o.src.slice(0, 80)),
  pictures: document.querySelectorAll('main img').length,
  faint: inked.filter(o => contrast(o) < 3).slice(0, 4).map(o => o.tagName + '.' + o.className + ' ' + contrast(o).toFixed(1) + ' ' + o.textContent.slice(0, 40)),
}})()'''
# what sticks out to the right and cannot be scrolled to inside a box of its own
WIDE = '''(() => {
  const kept = o => { for (o = o.parentElement; o && o.tagName != 'MAIN'; o = o.parentElement) if (/auto|scroll/.test(getComputedStyle(o).overflowX)) return true; return false };
  const far = [...document.querySelectorAll('main *')].filter(o => o.getBoundingClientRect().right > window.innerWidth + 1 && o.offsetParent && !/auto|scroll/.test(getComputedStyle(o).overflowX) && !kept(o));
  return [document.documentElement.scrollWidth - window.innerWidth, far.slice(0, 3).map(o => o.tagName + '.' + o.className + ' ' + o.innerText.slice(0, 40))] })()'''

def plots(page):
    "Number of pictures that the notebook behind a page holds, and whether it has formulas; None for the generated page."
    name = Path(page)
    found = [o for o in (root/'nbs'/name.parent).glob('*.ipynb') if re.sub(r'^\d+[a-z]?_', '', o.stem) == name.stem]
    if not found: return None
    cells = json.loads(found[0].read_text(encoding='utf-8'))['cells']
    shown = [c for c in cells if not re.search(r'^#\|\s*(hide|include:\s*false)', ''.join(c['source']), re.M)]
    prose = ''.join(''.join(c['source']) for c in shown if c['cell_type'] == 'markdown')
    images = sum('image/png' in o.get('data', {}) for c in shown for o in c.get('outputs', [])) + len(re.findall(r'!\[', prose))
    return images, '$$' in re.sub(r'```.*?```', '', prose, flags=re.S)

def wanted():
    "Pages that there have to be: one for each notebook, and the reference."
    books = [o.relative_to(root/'nbs') for o in (root/'nbs').rglob('*.ipynb') if not any(p[0] in '._' for p in o.relative_to(root/'nbs').parts)]
    return {o.with_name(re.sub(r'^\d+[a-z]?_', '', o.stem) + '.html').as_posix() for o in books} | {'api.html'}

def test_every_page_is_there(site):
    "Each notebook has its page; every module is on the page of all functions."
    assert set(pages(site)) >= wanted() and len(wanted()) > 25
    api = (site/'api.html').read_text(encoding='utf-8')
    for o in (root/'aquatic_nb').rglob('*.py'):
        if o.stem[0] != '_': assert '.'.join(o.relative_to(root).with_suffix('').parts) in api, o.stem

def test_notebooks_open_with_a_question_and_close_with_limits():
    """The book's form: title, one line, the question; at the end what was found, and its limits; of a chapter then two things to try, with folded
    solutions, and why the next one exists. No chapter grows too large."""
    for path in (root/'nbs').rglob('*.ipynb'):
        if '.ipynb_checkpoints' in path.parts: continue
        assert path.stat().st_size < 600_000, path.name
        prose = [''.join(c['source']) for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'markdown']
        assert re.match(r'# .+\n\n> .+', prose[0]), path.name
        heads = [o for text in prose for o in re.findall(r'^## .+', text, re.M)]
        assert len(heads) == len(set(heads)), (path.name, 'two sections of one name')
        if path.stem == 'index': continue
        assert prose[1].startswith('**The question'), path.name
        if re.match(r'\d', path.stem):
            assert heads.pop() == '## Two things to try' and prose[-1].count('<details><summary>Solution</summary>') == 2, path.name
            assert '**Next.** ' in prose[-1], path.name
        assert re.match(r'## (What this|What we have|The answer|Answer)', heads[-1]) and 'imit' in '\n'.join(prose).rsplit(heads[-1], 1)[1] + heads[-1], path.name
    kept = [o for o in (root/'nbs').rglob('*') if o.is_file() and o.suffix != '.failed' and '.ipynb_checkpoints' not in o.parts]
    assert sum(o.stat().st_size for o in kept) < 6_000_000

def test_pictures_are_told_in_words():
    "Each stored picture has a text for those who do not see it, and each chapter has its place on the way."
    for path in (root/'nbs').rglob('*.ipynb'):
        if '.ipynb_checkpoints' in path.parts: continue
        cells = json.loads(path.read_text(encoding='utf-8'))['cells']
        for c in cells:
            text = ''.join(c['source'])
            if any('image/png' in o.get('data', {}) for o in c.get('outputs', ())):
                said = re.search(r'^#\| fig-alt: "(.+)"$', text, re.M)
                assert said and len(said[1].split()) > 5, (path.name, text[:200])
            for alt in re.findall(r'!\[([^\]]*)\]\(', text) if c['cell_type'] == 'markdown' else (): assert len(alt.split()) > 5, (path.name, alt)
        if re.match(r'\d', path.stem): assert any('images/way' in ''.join(c['source']) for c in cells[:6]), path.name

def test_the_way_is_drawn_by_its_program(tmp_path):
    "nbs/images/way*.svg are what tools/way.py writes."
    spec = importlib.util.spec_from_file_location('way', root/'tools'/'way.py')
    way = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(way)
    kept = {o.name: o.read_text(encoding='utf-8') for o in (root/'nbs'/'images').glob('way*.svg')}
    way.root = tmp_path
    (tmp_path/'nbs'/'images').mkdir(parents=True)
    way.main()
    assert kept == {o.name: o.read_text(encoding='utf-8') for o in (tmp_path/'nbs'/'images').iterdir()}

def test_links_lead_somewhere(site):
    "The checks of tools/docs.py pass for the site as it is, and would notice a dead link, a dead anchor and a script from elsewhere."
    check = [sys.executable, '-c', "import sys; from pathlib import Path; sys.path.insert(0, 'tools'); import docs; docs.out = Path(sys.argv[1]); print(docs.check())"]
    good = subprocess.run([*check, site], cwd=root, capture_output=True, text=True, timeout=120)
    assert good.returncode == 0, good.stderr
    with tempfile.TemporaryDirectory() as folder:
        bad = Path(folder)/'site'
        shutil.copytree(site, bad)
        next(bad.rglob('aq.html')).write_text(next(bad.rglob('aq.html')).read_text(encoding='utf-8') + '<a href="nowhere.html">x</a><a href="index.html#no-such-place">x</a><script src="https://example.org/x.js"></script>', encoding='utf-8')
        said = subprocess.run([*check, bad], cwd=root, capture_output=True, text=True, timeout=120)
    assert said.returncode and all(o in said.stderr for o in ('nowhere.html', 'no-such-place', 'example.org')), said.stderr

def problems_of(page, seen):
    "What is wrong with a page that was looked at, in words."
    if not seen['heading']: yield 'no heading'
    if seen['formulas'] != seen['shown'] or seen['wrong'] or seen['raw']: yield f"formulas: {seen['shown']} of {seen['formulas']} shown, {seen['wrong']} {seen['raw']}"
    if seen['broken']: yield f"pictures: {seen['broken']}"
    if seen['faint']: yield f"hardly readable: {seen['faint']}"
    expected = plots(page)
    if expected and seen['pictures'] < expected[0]: yield f"{seen['pictures']} pictures, its notebook has {expected[0]}"
    if expected and expected[1] and not seen['shown']: yield 'no formula, its notebook has some'

def test_every_page_renders(site, url, browser):
    "Each page, light on a desk and dark on a phone: heading, formulas, pictures, contrast, no complaint, nothing wider than the screen."
    problems = []
    for page in pages(site):
        for name, width, dark in (('desk', 1300, False), ('phone, dark', 390, True)):
            browser.size(width, 850)
            browser.dark(dark)
            browser.go(url + page)
            over, what = browser.js(WIDE)
            if over > 1 or what: problems.append(f'{page}, {name}: {over} px too wide: {what}')
            problems += [f'{page}, {name}: {o}' for o in (*problems_of(page, browser.js(LOOK)), *browser.complaints(url))]
    browser.dark(False)
    assert not problems, '\n'.join(problems)

def test_the_checks_can_fail(url, browser):
    "What the test above looks for is noticed where it is put into a page by hand."
    browser.size(390, 850)
    browser.go(url + '01_theory/aq.html')
    browser.js("""document.querySelector('main').insertAdjacentHTML('beforeend', '<p>so $x_1$ is</p><p class="odd" style="color: #ddd; background: #fff">faint</p><img src="no.png"><div style="width: 900px">wide</div>');
        document.querySelector('main .math').innerHTML = 'x'; console.error('oh'); new Promise(done => setTimeout(done, 200))""")
    said = '\n'.join(problems_of('01_theory/aq.html', browser.js(LOOK))) + '\n'.join(browser.complaints(url)) + str(browser.js(WIDE))
    for o in ('$x_1$', 'shown', 'no.png', 'faint', 'oh', 'wide'): assert o in said, (o, said)

FIND = """(async name => {
    const o = [...document.querySelectorAll('.smalldocs-search input, #quarto-search input')].find(o => o.offsetParent);
    o.focus(); o.value = name; o.dispatchEvent(new Event('input', {bubbles: true}));
    for (let i = 0; i < 100; i++) {
        const hits = [...document.querySelectorAll('.search-result, .aa-Item a')].map(o => o.href);
        if (hits.length) return hits;
        await new Promise(done => setTimeout(done, 50));
    }
    return []
})"""

def test_search_finds(site, url, browser):
    "From every page, typing a name lists the place that explains it, by an address that exists; a name that is nowhere finds nothing of the kind."
    browser.size(1300, 900)
    for page in pages(site):
        browser.go(url + page)
        hits = browser.js(f"{FIND}('quantize_unet')")
        assert any(o.startswith(url + '09_door/quant.html') for o in hits), (page, hits)
        assert all((site/o[len(url):].split('#')[0].split('?')[0]).exists() for o in hits), (page, hits)
    browser.go(url + 'index.html')
    assert not any('quant.html' in o for o in browser.js(f"{FIND.replace('100', '10')}('qxzvw')"))

def test_search_reaches_all_functions(site):
    "Each entry of the page of all functions is in the index of the search, with its own anchor."
    if not (site/'search.json').exists(): pytest.skip('this build keeps its index elsewhere')
    index = {o['href'] for o in json.loads((site/'search.json').read_text(encoding='utf-8'))}
    entries = set(re.findall(r'href="(?:\./)?([\w/]+\.html#\w+)"><code', (site/'api.html').read_text(encoding='utf-8')))
    assert len(entries) > 200
    assert not entries - index, sorted(entries - index)[:10]

def test_search_ranks_the_chapter_first(url, browser):
    "A topic leads to the chapter about it, not to a helper function; a name to its own entry."
    browser.size(1300, 900)
    browser.go(url + 'index.html')
    topics = {'additive quantization': 'aq.html', 'calibration': 'calib.html', 'knapsack': 'knapsack.html', 'winograd': 'winograd.html',
              'momentum': 'semi_pv.html', 'distillation': 'distill.html', 'metrics': 'metrics.html'}
    for topic, page in topics.items():
        first = browser.js(f"{FIND}('{topic}')")[0]
        assert first.split('#')[0].endswith(page), (topic, first)
        browser.go(url + 'index.html')
    assert browser.js(f"{FIND}('stored_bytes')")[0].endswith('01_theory/aq.html#stored_bytes')

def test_phone_and_desk(url, browser):
    "The search box is seen on a phone; at 1280 the text column is as wide as it is styled, and its code does not scroll."
    browser.size(390, 850)
    browser.go(url + '01_theory/aq.html')
    assert browser.js("(o => o.offsetParent && o.getBoundingClientRect().width > 80 && o.getBoundingClientRect().right <= window.innerWidth)(document.querySelector('.smalldocs-search input'))")
    browser.size(1280, 900)
    browser.go(url + '01_theory/aq.html')
    assert browser.js("document.querySelector('main').getBoundingClientRect().width") >= 880
    blocks, wide, folded = browser.js("(o => [o.length, o.filter(p => p.scrollWidth > p.clientWidth + 1).length, o.filter(p => p.closest('details')).length])([...document.querySelectorAll('main div.sourceCode pre')])")
    assert blocks > 20 and wide == 0 and folded < 3, (blocks, wide, folded)
    browser.size(1300, 900)

def test_what_the_reference_tells(site):
    "Methods with what they do, defaults, every error, links to notebook and module; names in the order of the notebook."
    page = (site/'07_tuning'/'semi_pv.html').read_text(encoding='utf-8')
    for o in ('id="semipv.step"', 'id="semipv.invalidate"', 'membership=0.1', '/blob/main/nbs/07_tuning/20_semi_pv.ipynb', '/blob/main/aquatic_nb/semi_pv.py', 'rel="icon"'): assert o in page, o
    assert 'ClassConditionalLDMPipeline.__call__(' in (site/'02_models'/'pipeline.html').read_text(encoding='utf-8')
    for o in site.rglob('*.html'): assert 'more, see the source' not in o.read_text(encoding='utf-8'), o
    aq = (site/'01_theory'/'aq.html').read_text(encoding='utf-8')
    places = [aq.index(f'id="{o}"') for o in ('scheme', 'parse_scheme', 'stored_bytes', 'aqtensor', 'decode', 'pack_codes')]
    assert places == sorted(places)

def test_works_from_the_disk(site, browser):
    "Opened as a file, without a server: formulas and the search."
    browser.size(1300, 900)
    browser.go((site/'01_theory'/'aq.html').as_uri())
    seen = browser.js(LOOK)
    assert seen['formulas'] == seen['shown'] > 10
    assert any('quant.html' in o for o in browser.js(f"{FIND}('quantize_unet')"))

def test_light_and_dark(url, browser):
    "The page follows the reader's system, and stays readable either way."
    browser.size(1300, 900)
    grounds = []
    for on in (False, True):
        browser.dark(on)
        browser.go(url + 'index.html')
        grounds.append(browser.js("['background-color', 'color'].map(k => { const [r, g, b] = getComputedStyle(document.body)[k == 'color' ? 'color' : 'backgroundColor'].match(/[\\d.]+/g).map(Number); return .3*r + .59*g + .11*b })"))
    browser.dark(False)
    (ground, ink), (dark_ground, dark_ink) = grounds
    assert ground > 200 and ink < 100 and dark_ground < 80 and dark_ink > 170, grounds
