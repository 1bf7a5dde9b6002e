"""The documentation site in a real browser: no console errors, nothing from the network, formulas and pictures seen, search finds, phones fit.

Chromium is driven through its debugging pipe, which needs nothing but the standard library.
"""
import contextlib, fcntl, functools, http.server, importlib.util, json, os, select, shutil, subprocess, sys, tempfile, threading, time
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
    return any(o.stat().st_mtime > made for o in sources if not o.name.endswith('.failed'))

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

LOOK = '''({
  heading: (document.querySelector('h1') || {}).innerText || '',
  formulas: document.querySelectorAll('.math').length,
  shown: document.querySelectorAll('.math .katex').length,
  wrong: [...document.querySelectorAll('.katex-error')].map(o => o.title + ' in ' + o.innerText),
  raw: [...document.querySelectorAll('main p, main li, main td')].filter(o => !o.querySelector('code') && /\\$\\$|\\\\frac|\\\\sum/.test(o.innerText) && !o.querySelector('.katex')).map(o => o.innerText.slice(0, 80)),
  pictures: [...document.images].filter(o => !(o.complete && o.naturalWidth)).map(o => o.src.slice(0, 80)),
})'''
WIDE = '''[document.documentElement.scrollWidth - window.innerWidth,
  [...document.querySelectorAll('main *')].filter(o => o.getBoundingClientRect().right > window.innerWidth + 1 && !o.closest('pre, .katex, .katex-display, .params, .cell-output, .cell-output-display, table, .sourceCode')).slice(0, 5).map(o => o.tagName + '.' + o.className + ' ' + o.innerText.slice(0, 40))]'''

def test_every_page_renders(site, url, browser):
    "Each page, on a desk and on a phone: a heading, all formulas, all pictures, no complaint, nothing wider than the screen."
    problems, formulas = [], 0
    assert 'index.html' in pages(site) and 'api.html' in pages(site)
    for page in pages(site):
        browser.size(1300, 900)
        browser.go(url + page)
        seen = browser.js(LOOK)
        formulas += seen['shown']
        if not seen['heading']: problems.append(f'{page}: no heading')
        if seen['formulas'] != seen['shown'] or seen['wrong'] or seen['raw']: problems.append(f'{page}: formulas {seen}')
        if seen['pictures']: problems.append(f"{page}: pictures {seen['pictures']}")
        problems += [f'{page}: {o}' for o in browser.complaints(url)]
        browser.size(390, 800)
        over, what = browser.js(WIDE)
        if over > 1: problems.append(f'{page}: {over} px wider than a phone: {what}')
    assert not problems, '\n'.join(problems)
    assert formulas > 0

def test_search_finds(site, url, browser):
    "Typing a name lists the place that explains it."
    name = 'quantize_unet' if (site/'quant.html').exists() else 'write_atomic'
    browser.size(1300, 900)
    browser.go(url + 'index.html')
    browser.js(f"""(() => {{ const o = [...document.querySelectorAll('.smalldocs-search input, #quarto-search input')].find(o => o.offsetParent);
        o.focus(); o.value = '{name}'; o.dispatchEvent(new Event('input', {{bubbles: true}})); }})()""")
    hits = []
    for _ in range(50):
        hits = browser.js("[...document.querySelectorAll('.search-result, .aa-Item a')].map(o => o.getAttribute('href'))")
        if hits: break
        time.sleep(0.1)
    assert any(name in o or 'quant.html' in o or 'core.html' in o for o in hits), hits

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
