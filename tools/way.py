"""The way from weights to file and pictures, one drawing with one place marked: nbs/images/way_*.svg. `python tools/way.py` writes all."""
from pathlib import Path

root = Path(__file__).resolve().parents[1]
STATIONS = [ # key, two lines, chapters, glyph
    ('model', 'a model', 'in 16 bits', '03 to 09'), ('inputs', 'what flows', 'into a layer', '10'), ('bits', 'bits for', 'each layer', '14 to 17'),
    ('codes', 'codes: sums', 'of vectors', '01 02 11'), ('packed', 'packed', 'layers', '12 13 18'), ('tuning', 'tuned by its', 'own teacher', '19 to 21'),
    ('file', 'a file,', 'every byte', '22 23'), ('kernels', 'kernels', 'that read it', '25 to 34'), ('pictures', 'pictures,', 'judged', '35 to 39')]
W, STEP, INK, MARK, SOFT = 82, 98, '#444', '#0b7285', '#e3f2f4'

def squares(x, y, shades, n=4, s=7):
    "A little table of shades."
    return ''.join(f'<rect x="{x + s*(i % n)}" y="{y + s*(i//n)}" width="{s-1}" height="{s-1}" fill="{c}"/>' for i, c in enumerate(shades))

def glyph(key, x, ink):
    "The small drawing in a station."
    y = 30
    grays = ['#999', '#ccc', '#777', '#bbb', '#aaa', '#666', '#ddd', '#888', '#bbb', '#999', '#777', '#ccc']
    line = lambda points: f'<polyline points="{points}" fill="none" stroke="{ink}" stroke-width="2"/>'
    match key:
        case 'model': return squares(x + 27, y, grays)
        case 'inputs': return squares(x + 28, y, [ink if i % 4 == i//4 else '#ccc' if abs(i % 4 - i//4) == 1 else '#eee' for i in range(16)], s=6)
        case 'bits': return ''.join(f'<rect x="{x + 24 + 9*i}" y="{y + 22 - h}" width="7" height="{h}" fill="{ink}"/>' for i, h in enumerate((8, 20, 5, 12)))
        case 'codes': return squares(x + 14, y + 3, grays[:6], 2) + f'<text x="{x + 41}" y="{y + 18}" class="g">+</text>' + squares(x + 54, y + 3, [ink, '#9bd', '#cde', ink, '#9bd', ink], 2)
        case 'packed': return ''.join(f'<rect x="{x + 22 + 4*i}" y="{y + 7*i}" width="30" height="9" fill="#fff" stroke="{ink}"/>' for i in range(3))
        case 'tuning': return line(f'{x + 20},{y} {x + 28},{y + 14} {x + 33},{y + 10} {x + 42},{y + 19} {x + 48},{y + 17} {x + 62},{y + 22}')
        case 'file': return f'<path d="M{x + 31},{y - 2} h14 l7,7 v19 h-21 z" fill="#fff" stroke="{ink}" stroke-width="1.5"/>' + line(f'{x + 35},{y + 12} {x + 48},{y + 12}') + line(f'{x + 35},{y + 18} {x + 48},{y + 18}')
        case 'kernels': return f'<path d="M{x + 44},{y - 2} l-12,14 h8 l-4,12 12,-15 h-8 z" fill="{ink}"/>'
        case 'pictures': return ''.join(f'<rect x="{x + 19 + 24*i}" y="{y}" width="20" height="22" fill="#fff" stroke="{ink}"/><circle cx="{x + 29 + 24*i}" cy="{y + 10 + i}" r="5" fill="{ink}"/>' for i in range(2))

def drawing(marked=None):
    "The whole way as SVG, with one station in colour; 'call' marks the line above that does all of it."
    call = marked == 'call'
    out = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 872 118" width="872" height="118" role="img" font-family="sans-serif" font-size="11" text-anchor="middle">',
           f'<style>.g{{font-size:17px;fill:{INK}}} .n{{font-size:10px;fill:#777}}</style><rect width="872" height="118" fill="#fff"/>',
           f'<path d="M4,18 v-6 H868 v6" fill="none" stroke="{MARK if call else "#999"}" stroke-width="{2.5 if call else 1}"/>',
           f'<rect x="300" y="2" width="272" height="18" rx="4" fill="{MARK if call else "#fff"}"/><text x="436" y="15" fill="{"#fff" if call else "#666"}">one call: 24, from the command line: 40 41</text>']
    for i, (key, a, b, chapters) in enumerate(STATIONS):
        x, here = 3 + STEP*i, key == marked
        ink = MARK if here else INK
        out.append(f'<rect x="{x}" y="24" width="{W}" height="74" rx="7" fill="{SOFT if here else "#fff"}" stroke="{MARK if here else "#bbb"}" stroke-width="{2.5 if here else 1}"/>{glyph(key, x, ink)}'
                   f'<text x="{x + W/2}" y="74" fill="{ink}" font-weight="{"bold" if here else "normal"}">{a}</text><text x="{x + W/2}" y="89" fill="{ink}" font-weight="{"bold" if here else "normal"}">{b}</text>'
                   f'<text x="{x + W/2}" y="112" class="n">{chapters}</text>')
        if i: out.append(f'<path d="M{x - 14},61 h9 m-4,-4 l4,4 -4,4" fill="none" stroke="{INK}" stroke-width="1.4"/>')
    return '\n'.join(out) + '\n</svg>\n'

def main():
    for key in (None, 'call', *(o[0] for o in STATIONS)):
        (root/'nbs'/'images'/(f'way_{key}.svg' if key else 'way.svg')).write_text(drawing(key), encoding='utf-8')

if __name__ == '__main__': main()
