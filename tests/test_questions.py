"""Ten questions a chapter, in tests/questions: what answers each of them stands in the chapter, word for word."""
import json, re
from pathlib import Path
import pytest, yaml

root = Path(__file__).resolve().parents[1]
files = sorted((root/'tests'/'questions').glob('*.yml'))

def chapter(stem):
    "All that a reader of a chapter sees, as one line: prose, code and what it printed."
    path = next((root/'nbs').rglob(f'{stem}.ipynb'))
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    seen = [''.join(c['source']) for c in cells]
    for c in cells:
        for o in c.get('outputs', ()): seen += [''.join(o.get('text', '')), ''.join(o.get('data', {}).get('text/plain', ''))]
    return one_line(' '.join(seen))

def one_line(text):
    "Without line breaks, the marks of emphasis, and the addresses of links."
    return re.sub(r'\s+', ' ', re.sub(r'\[([^\]]*)\]\([^)]*\)', r'\1', text).replace('*', ''))

@pytest.mark.parametrize('path', files, ids=lambda o: o.stem)
def test_a_chapter_answers_its_questions(path):
    asked, text = yaml.safe_load(path.read_text(encoding='utf-8')), chapter(path.stem)
    assert len(asked) == 10 and len({o['ask'] for o in asked}) == 10
    missing = [o['ask'] for o in asked if one_line(o['text']) not in text]
    assert not missing, missing
    assert all(len(o['answer'].split()) > 0 and o['ask'].endswith(('?', '.')) for o in asked)

def test_there_are_questions(): assert len(files) >= 10
