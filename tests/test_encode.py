"""The encoder on random problems: what has to hold for every layer, whatever its shape, its inputs and its scheme."""
import aquatic_nb # noqa: F401  first: torchvision may lack its operators
import itertools

import pytest
import torch
from hypothesis import given, settings, strategies as st

from aquatic_nb import encode as E
from aquatic_nb.aq import Scheme, check_values, decode, decode_rows, pack_codes, sum_codewords, unpack_codes
from aquatic_nb.encode import (State, corrected_target, damp, encode_rows, nearest_plane, refit_codebooks, refit_scales,
                               relative_error, search_codes, start, sweep_codes, to_aq)
from aquatic_nb.core import generator, single_thread

def moments(N, kind, gen):
    "Second moments of inputs: correlated, of low rank, zero, or with a few dead dimensions."
    X = torch.randn(2*N + 3, N, generator=gen) @ torch.randn(N, N, generator=gen)
    if kind == 'low rank': X = torch.randn(50, 2, generator=gen) @ torch.randn(2, N, generator=gen)
    if kind == 'dead': X[:, ::3] = 0
    return torch.zeros(N, N) if kind == 'zero' else X.T @ X/len(X)

def never_rises(state, size):
    "Each half-step's loss is at most the one before; rounding to what is stored is not a half-step."
    for (_, before), (step, after) in zip(state.trace, state.trace[1:]):
        if step != 'storage': assert after <= before*(1 + 1e-4) + 1e-8*size, step

kinds = st.sampled_from(['correlated', 'low rank', 'zero', 'dead'])
schemes = st.builds(Scheme, st.integers(1, 4), st.integers(1, 5), st.sampled_from([1, 3, 8, 9]),
                    st.sampled_from(['int8', 'fp16']))

@settings(max_examples=60, deadline=None)
@given(schemes, st.integers(1, 12), st.integers(1, 40), kinds, st.booleans(), st.integers(0, 10**6))
def test_every_layer_can_be_encoded(scheme, O, N, kind, zero_row, seed):
    gen = generator(seed, 'layer')
    W, H = torch.randn(O, N, generator=gen)*10**float(torch.empty(()).uniform_(-3, 1, generator=gen)), moments(N, kind, gen)
    if zero_row: W[0] = 0
    state = encode_rows(W, H, scheme, beam=3, sweeps=3, seed=seed)
    never_rises(state, float((W @ damp(H)*W).sum()))
    aq = to_aq(state, (O, N))
    check_values(aq)
    torch.testing.assert_close(decode(aq), state.What[:, :N], rtol=1e-5, atol=1e-7)
    assert torch.isfinite(decode(aq)).all()
    if zero_row: assert not decode(aq)[0].any()

@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 6), st.integers(0, 10**6))
def test_search_is_exact_when_the_beam_holds_everything(M, B, d, seed):
    gen = generator(seed, 'search')
    K, O = 2**B, 5
    C, a, X = torch.randn(M, K, d, generator=gen), torch.randn(O, d, generator=gen), torch.randn(20, d, generator=gen)
    H = X.T @ X/20
    cost = lambda c: ((sum_codewords(c, C) @ H)*sum_codewords(c, C) - 2*a*sum_codewords(c, C)).sum(-1)
    first = torch.randint(0, K, (O, M), generator=gen).to(torch.int32)
    found = search_codes(a, C, H, first, beam=K**M)
    best = torch.stack([cost(torch.tensor(c).expand(O, M)) for c in itertools.product(range(K), repeat=M)]).min(0).values
    torch.testing.assert_close(cost(found), best, rtol=1e-3, atol=1e-4)
    narrow = search_codes(a, C, H, first, beam=1)
    assert (cost(narrow) <= cost(first) + 1e-4).all()
    if M == 1: return
    plain = E._search_torch(a, C, C @ H, ((C @ H)*C).sum(-1), first.clone(), K**M, 3)
    torch.testing.assert_close(cost(plain), best, rtol=1e-3, atol=1e-4)

@settings(max_examples=30, deadline=None)
@given(st.integers(1, 2), st.integers(1, 2), st.integers(1, 2), st.integers(1, 3), st.integers(0, 10**6))
def test_a_tiny_row_is_encoded_as_by_brute_force(M, B, d, J, seed):
    "No descent is promised the best of all codes; but it may not lie below it, and on rows of three groups it is near."
    gen = generator(seed, 'tiny')
    C, W = torch.randn(M, 2**B, d, generator=gen), torch.randn(8, J*d, generator=gen)
    H = damp(moments(J*d, 'correlated', gen))
    ways = torch.tensor(list(itertools.product(range(2**B), repeat=J*M))).reshape(-1, J, M)
    E_all = W[:, None] - sum_codewords(ways, C).flatten(1)
    best = ((E_all @ H)*E_all).sum(-1).min(1).values
    state = State(W, H, Scheme(M, B, d), torch.zeros(8, J, M, dtype=torch.int32), C, torch.ones(8))
    E._ready(state, 'first')
    nearest_plane(state, beam=16)
    for _ in range(4): sweep_codes(state, beam=16)
    found = ((W - state.What)*state.G).sum(1)
    assert (found >= best*(1 - 1e-3) - 1e-5).all()
    if J == 1: torch.testing.assert_close(found, best, rtol=1e-3, atol=1e-4)
    assert found.sum() <= 2*best.sum() + 1e-4

@settings(max_examples=25, deadline=None)
@given(schemes, st.integers(1, 12), st.integers(1, 40), kinds, st.integers(0, 10**6))
def test_every_half_step_lowers_the_loss(scheme, O, N, kind, seed):
    gen = generator(seed, 'steps')
    W, H = E._posed(torch.randn(O, N, generator=gen), moments(N, kind, gen), scheme)
    state = start(W, H, scheme, seed)
    steps = (nearest_plane, sweep_codes, refit_codebooks, refit_scales)
    for i in torch.randint(0, 4, (8,), generator=gen):
        before = state.loss()
        steps[i](state)
        exact = W - (sum_codewords(state.codes, state.C)*state.scales[:, None, None]).flatten(1)
        loss = float(((exact.double() @ H.double())*exact).sum())
        size = float(((W @ H)*W).sum())
        assert state.loss() <= before*(1 + 1e-4) + 1e-8*size, steps[i]
        assert abs(state.loss() - loss) <= 1e-3*loss + 1e-5*size      # what is carried along is what it says

def layer(seed=0, O=64, N=72):
    gen = generator(seed, 'layer')
    return torch.randn(O, N, generator=gen), moments(N, 'correlated', gen)

def test_nearest_plane_beats_sweeps_alone():
    "Inputs as networks have them: a few loud directions, a long tail, and a mean."
    gen, N, scheme = generator(0, 'tail'), 192, Scheme(2, 5, 8)
    mix = torch.randn(N, N, generator=gen)*torch.logspace(0, -1.5, N)
    X = torch.randn(4*N, N, generator=gen) @ mix.T + .3*N**.5*torch.randn(1, N, generator=gen)
    posed = E._posed(torch.randn(48, N, generator=gen), X.T @ X/len(X), scheme)
    one, other = start(*posed, scheme), start(*posed, scheme)
    for i in range(3):
        for st_, codes in ((one, nearest_plane if i < 2 else sweep_codes), (other, sweep_codes)):
            codes(st_); refit_codebooks(st_); refit_scales(st_)
    assert one.loss() < .95*other.loss()

@pytest.mark.parametrize('scheme', [Scheme(2, 5, 8), Scheme(1, 6, 9), Scheme(1, 4, 1, kind='uniform'),
                                    Scheme(2, 5, 8, 'fp16')])
def test_a_warm_start_is_never_worse(scheme):
    W, H = layer(1)
    cold = encode_rows(W, H, scheme, sweeps=1)
    for given_ in (cold, to_aq(cold, (64, 72))):
        codes = cold.codes.clone()
        warm = encode_rows(W, H, scheme, sweeps=3, start=given_)
        assert warm.loss() <= cold.loss()*(1 + 1e-5)
        assert torch.equal(cold.codes, codes), 'the start was changed'
        again = encode_rows(W, H, scheme, sweeps=3, start=warm)
        assert again.loss() <= warm.loss()*(1 + 1e-5)

def test_more_codebooks_from_fewer():
    W, H = layer(2)
    one = encode_rows(W, H, Scheme(1, 5, 8))
    two = encode_rows(W, H, Scheme(2, 5, 8), start=to_aq(one, (64, 72)))
    assert two.loss() < .6*one.loss()
    assert two.loss() < 1.2*encode_rows(W, H, Scheme(2, 5, 8)).loss()
    for rows, scheme in ((W, Scheme(1, 5, 8)), (W, Scheme(2, 6, 8)), (W, Scheme(2, 5, 9)), (W[:9], Scheme(2, 5, 8))):
        with pytest.raises(ValueError, match='start: an encoding under 2x5b/8'):
            encode_rows(rows, H, scheme, start=two)

@pytest.mark.parametrize('M,worst', [(1, 1.05), (2, 1.05), (4, 1.6)])
def test_int8_codebooks_cost_little(M, worst):
    W, H = layer(3)
    loss = {t: encode_rows(W, H, Scheme(M, 5, 8, t), sweeps=4).loss() for t in ('int8', 'fp16')}
    assert loss['int8'] <= worst*loss['fp16']

def test_rounds_stop_when_the_loss_has_settled():
    W, H = layer(4)
    n = {t: len(encode_rows(W, H, Scheme(2, 5, 8), sweeps=30, tolerance=t).trace) for t in (.1, .01, 0)}
    assert n[.1] < n[.01] < n[0]

def test_corrected_target_is_least_squares():
    gen = generator(0, 'target')
    X, W = torch.randn(400, 12, generator=gen, dtype=torch.float64), torch.randn(5, 12, generator=gen, dtype=torch.float64)
    Y = X + .3*torch.randn(400, 12, generator=gen, dtype=torch.float64)   # what the layer will see instead of X
    H, D = Y.T @ Y/400, (X - Y).T @ Y/400
    best = torch.linalg.lstsq(Y, X @ W.T).solution.T
    torch.testing.assert_close(corrected_target(W, H, D), best)

def test_bytes_do_not_depend_on_threads():
    gen = generator(1, 'threads')
    W, H, before = torch.randn(64, 72, generator=gen), moments(72, 'correlated', gen), torch.get_num_threads()
    found = []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            with single_thread(): found.append(to_aq(encode_rows(W, H, Scheme(2, 6, 9)), (64, 72)))
    finally: torch.set_num_threads(before)
    for part in ('codes', 'codebooks', 'scales'): assert torch.equal(getattr(found[0], part), getattr(found[1], part)), part

def test_calibration_beats_weight_error():
    gen = generator(2, 'calibration')
    W, H = torch.randn(48, 64, generator=gen), moments(64, 'correlated', gen)
    error = lambda use: relative_error(W, encode_rows(W, use, Scheme(2, 6, 8)).What, H)
    assert error(H) < .6*error(None)

@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 5), st.integers(1, 7), st.integers(1, 4), st.integers(0, 10**6))
def test_packing_is_lossless(bits, O, J, M, seed):
    codes = torch.randint(0, 2**bits, (O, J, M), generator=generator(seed, 'codes'))
    assert torch.equal(unpack_codes(*pack_codes(codes, bits), bits, (O, J, M)).long(), codes)

def test_half_precision_codebooks_are_added_in_float32():
    gen = generator(3, 'halves')
    state = encode_rows(torch.randn(6, 24, generator=gen), None, Scheme(4, 4, 8, 'fp16'))
    aq = to_aq(state, (6, 24))
    want = sum(aq.codebooks[m].double()[aq.codes[..., m].long()] for m in range(4)).flatten(1)*aq.scales.double()[:, None]
    torch.testing.assert_close(decode_rows(aq).double(), want, rtol=1e-6, atol=1e-9)

@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_bad_numbers_are_named(bad):
    W = torch.randn(4, 8, generator=generator(4, 'bad'))
    H = torch.eye(8); H[0, 0] = bad
    with pytest.raises(ValueError, match='H holds NaN or infinity'): encode_rows(W, H, Scheme(1, 2, 8))
    W[1, 2] = bad
    with pytest.raises(ValueError, match='weight holds NaN or infinity'): encode_rows(W, None, Scheme(1, 2, 8))
    with pytest.raises(ValueError, match='range of fp16'):
        encode_rows(torch.full((4, 8), 1e9), None, Scheme(1, 2, 8, 'fp16'))
