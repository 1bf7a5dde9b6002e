"""Schemes as text, and the grammar of a layer's setting: what is written is read, and what can't be is refused by name."""
import pytest
from hypothesis import given, strategies as st

from aquatic_nb.aq import Scheme, parse_scheme, stored_bytes
from aquatic_nb.kaq import as_scheme, match_layers

texts = st.text(st.characters(blacklist_categories=['Cs']), max_size=12)
additive = st.builds(Scheme, st.integers(1, 8), st.integers(1, 12), st.integers(1, 64), st.sampled_from(['int8', 'fp16']), share=texts)
integers = st.builds(lambda b: Scheme(1, b, 1, kind='uniform'), st.integers(1, 8))

@given(additive | integers)
def test_what_str_writes_is_read(scheme): assert parse_scheme(str(scheme)) == scheme

@given(texts)
def test_a_text_is_a_scheme_or_named(text):
    try: found = parse_scheme(text)
    except ValueError as e: assert repr(text) in str(e) or 'Scheme:' in str(e)
    else: assert found == 'dense' or parse_scheme(str(found)) == found

def test_dense_bytes(): assert stored_bytes('dense', (3, 4, 3, 3), dense_bytes=2) == 2*3*4*9

@pytest.mark.parametrize('bad', [0, 9, True, None, 2.5, (2,), (2, 8, 8), (0, 8), (2., 8), '2x8', 'Dense', '2x8b/9@kind'])
def test_a_bad_setting_is_named(bad):
    with pytest.raises(ValueError, match='overrides: .conv.* is set to'): match_layers({'conv*': bad}, {'conv_in': (8, 3, 3, 3)})
    with pytest.raises(ValueError, match='^here is set to'): as_scheme(bad, (8, 8), 'here')

def test_later_patterns_win():
    shapes = {'a.conv': (8, 8, 3, 3), 'a.proj': (8, 8)}
    got = match_layers({'*': (2, 6), 'a.p*': 'dense', '*.conv': '1x4b/9'}, shapes)
    assert got == {'a.conv': Scheme(1, 4, 9), 'a.proj': 'dense'}
    assert match_layers({'*': [2, 6]}, shapes) == {'a.conv': Scheme(2, 6, 9), 'a.proj': Scheme(2, 6, 8)}
