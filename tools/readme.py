"""README.md from nbs/index.ipynb: prose as it is, code in fences, outputs below; paths made relative to the top folder.

`python tools/readme.py` writes it, `--check` compares. No Quarto needed, so that the same README comes out everywhere.
"""
import json, re, sys
from pathlib import Path

root = Path(__file__).resolve().parents[1]
NOTE = '<!-- Made from nbs/index.ipynb by tools/readme.py: edit that. -->\n'

def text(o): return ''.join(o) if isinstance(o, list) else o

def relink(md):
    "Links of the notebook as seen from the folder above it; pages that only the site has go to their notebooks."
    def fix(m):
        path = m[2]
        if re.match(r'[a-z]+:|#|/', path): return m[0]
        return f"{m[1]}nbs/{path}{m[3]}" if not path.startswith('../') else f'{m[1]}{path[3:]}{m[3]}'
    md = re.sub(r'(\]\()([^)\s]+)(\))', fix, md)
    return re.sub(r'(<img[^>]* src=")([^"]+)(")', fix, md)

def outputs(cell):
    "What a code cell printed or showed: markdown as it is, the rest indented."
    for o in cell.get('outputs', []):
        data = o.get('data', {})
        if 'text/markdown' in data: yield relink(text(data['text/markdown'])).strip()
        elif 'text/plain' in data or o.get('output_type') == 'stream':
            said = text(data.get('text/plain') or o.get('text', '')).rstrip()
            if said: yield '\n'.join('    ' + l for l in said.splitlines())

def render():
    "The README as one string."
    nb = json.loads((root/'nbs'/'index.ipynb').read_text(encoding='utf-8'))
    parts = [NOTE]
    for cell in nb['cells']:
        src = text(cell['source'])
        if cell['cell_type'] == 'markdown': parts.append(relink(src).strip())
        if cell['cell_type'] != 'code' or re.search(r'^#\|\s*hide\s*$', src, re.M): continue
        code = re.sub(r'^#\|.*\n?', '', src, flags=re.M).strip()
        if code and not re.search(r'^#\|\s*echo:\s*false', src, re.M): parts.append(f'```python\n{code}\n```')
        parts += outputs(cell)
    return '\n\n'.join(o.rstrip('\n') for o in parts if o) + '\n'

def main():
    path, new = root/'README.md', render()
    if '--check' not in sys.argv: return path.write_text(new, encoding='utf-8')
    if not path.exists() or path.read_text(encoding='utf-8') != new:
        sys.exit('README.md is not what nbs/index.ipynb says: run python tools/readme.py and commit it')

if __name__ == '__main__': main()
