"Metrics against closed forms, against scipy, and against torch-fidelity's own numbers."
import io
import os
import pickle
import warnings

import numpy as np
import pytest
import scipy.linalg
import scipy.ndimage
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image

import aquatic_nb.core  # noqa: F401  (first: declares the operators that torchvision expects)
from aquatic_nb import metrics as M

warnings.filterwarnings('ignore', message='.*covariance has rank.*')


def gaussian(seed, d, n=None):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n or 4*d, d)) @ rng.normal(size=(d, d)) + rng.normal(size=d)
    return x.mean(0), np.cov(x.T).reshape(d, d)


# ---- Frechet distance ----

@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 24))
def test_frechet_is_scipys_and_torch_fidelitys(seed, d):
    from torch_fidelity.metric_fid import fid_statistics_to_metric
    (m1, s1), (m2, s2) = gaussian(seed, d), gaussian(seed + 1, d)
    got = M.frechet_distance(m1, s1, m2, s2)
    root = scipy.linalg.sqrtm(s1 @ s2).real
    assert got == pytest.approx(((m1 - m2)**2).sum() + np.trace(s1 + s2 - 2*root), rel=1e-6, abs=1e-7*np.trace(s1 + s2))
    theirs = fid_statistics_to_metric(dict(mu=m1, sigma=s1), dict(mu=m2, sigma=s2), False)
    assert got == pytest.approx(theirs['frechet_inception_distance'], rel=1e-6, abs=1e-7*np.trace(s1 + s2))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5), st.floats(0, 9), st.floats(0, 9)), min_size=1, max_size=12))
def test_frechet_of_diagonal_gaussians_is_the_closed_form(rows):
    m1, m2, v1, v2 = np.array(rows).T
    expected = ((m1 - m2)**2 + (np.sqrt(v1) - np.sqrt(v2))**2).sum()
    assert M.frechet_distance(m1, np.diag(v1), m2, np.diag(v2)) == pytest.approx(expected, rel=1e-6, abs=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 16))
def test_frechet_ignores_a_rotation_of_both_and_grows_with_the_square_of_the_scale(seed, d):
    (m1, s1), (m2, s2) = gaussian(seed, d), gaussian(seed + 1, d)
    q = np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))[0]
    base, small = M.frechet_distance(m1, s1, m2, s2), 1e-6*np.trace(s1 + s2)
    assert M.frechet_distance(q@m1, q@s1@q.T, q@m2, q@s2@q.T) == pytest.approx(base, rel=1e-6, abs=small)
    assert M.frechet_distance(3*m1, 9*s1, 3*m2, 9*s2) == pytest.approx(9*base, rel=1e-6, abs=9*small)
    assert M.frechet_distance(m2, s2, m1, s1) == pytest.approx(base, rel=1e-6, abs=small)
    assert M.frechet_distance(m1, s1, m1, s1) == pytest.approx(0, abs=1e-6*np.trace(s1))


def test_frechet_of_singular_covariances():
    m1, s1 = gaussian(0, 40, 10)
    assert np.linalg.matrix_rank(s1) == 9
    assert M.frechet_distance(m1, s1, m1, s1) < 1e-5*np.trace(s1)
    # rank one: sqrt of a a^T b b^T has trace |a.b|
    a, b = np.arange(1., 5.), np.array([2., 0, -1, 1])
    expected = a@a + b@b - 2*abs(a@b)
    assert M.frechet_distance(0*a, np.outer(a, a), 0*a, np.outer(b, b)) == pytest.approx(expected)


@pytest.mark.parametrize('bad,says', [
    (dict(mu1=np.eye(2)), 'expected [d] and [d,d]'), (dict(sigma2=np.full((3, 3), np.nan)), 'second statistics hold NaN'),
    (dict(sigma1=np.triu(np.ones((3, 3)))), 'not symmetric'), (dict(mu2=np.zeros(4), sigma2=np.eye(4)), 'one extractor')])
def test_frechet_refuses(bad, says):
    good = dict(mu1=np.zeros(3), sigma1=np.eye(3), mu2=np.zeros(3), sigma2=np.eye(3))
    with pytest.raises(ValueError) as e: M.frechet_distance(**{**good, **bad})
    assert says in str(e.value)


# ---- statistics of a crowd ----

def test_statistics_do_not_depend_on_order_and_joined_sets_are_the_whole():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(9000, 5)).astype(np.float32) + 50
    mu, sigma = M.gaussian_stats(x)
    other = M.gaussian_stats(rng.permutation(x))
    np.testing.assert_allclose(mu, other[0], rtol=1e-12)
    np.testing.assert_allclose(sigma, other[1], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(sigma, np.cov(x.T.astype(np.float64)), rtol=1e-9, atol=1e-12)
    joined = M.FeatureSet.join(M.FeatureSet(o) for o in np.array_split(x, 7))
    assert all((a == b).all() for a, b in zip(M.gaussian_stats(joined.features), (mu, sigma)))


def test_too_few_samples_warn_with_the_rank():
    with pytest.warns(UserWarning, match='rank 4 at most'): M.gaussian_stats(np.random.default_rng(0).normal(size=(5, 8)))
    with pytest.raises(ValueError, match='more than 8'): M.gaussian_stats(np.zeros((1, 8)))


def test_feature_set_survives_a_file(tmp_path):
    s = M.FeatureSet(np.ones((3, 2), np.float32), logits=np.zeros((3, 4), np.float32))
    again = M.FeatureSet.load(s.save(tmp_path/'s.npz'))
    assert (again.features == s.features).all() and again.spatial is None and again.logits.shape == (3, 4)
    np.savez(tmp_path/'other.npz', x=np.zeros(1))
    with pytest.raises(ValueError, match="holds \\['x'\\]"): M.FeatureSet.load(tmp_path/'other.npz')


# ---- Inception score, precision ----

@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(20, 200), st.integers(2, 10))
def test_inception_score_by_its_definition(seed, n, classes):
    logits = np.random.default_rng(seed).normal(size=(n, classes))*3
    p = np.exp(logits)/np.exp(logits).sum(1, keepdims=True)
    scores = []
    for i in range(10): # ten sequential parts, as they come
        part = p[i*n//10:(i + 1)*n//10]
        scores.append(np.exp((part*np.log(part/part.mean(0))).sum(1).mean()))
    assert M.inception_score(logits, 10) == pytest.approx((np.mean(scores), np.std(scores), 10), rel=1e-6)


@pytest.mark.parametrize('n, parts', [(2000, 1), (10_000, 2), (12_000, 3)])
def test_inception_score_is_split_as_adm_splits(n, parts):
    "Every 5,000 images, the last part as long as it comes; written as in ADM's evaluator. Ten parts score lower, but at 50,000."
    logits = np.random.default_rng(n).normal(size=(n, 300))*2
    preds = np.exp(logits)/np.exp(logits).sum(1, keepdims=True)
    scores = []
    for i in range(0, n, 5000):
        part = preds[i:i + 5000]
        kl = part*(np.log(part) - np.log(np.expand_dims(np.mean(part, 0), 0)))
        scores.append(np.exp(np.mean(np.sum(kl, 1))))
    assert M.inception_score(logits) == pytest.approx((np.mean(scores), np.std(scores), parts), rel=1e-9, abs=1e-9)
    assert M.inception_score(logits, 10)[0] < .996*np.mean(scores)
    row = M.evaluate_images(M.FeatureSet(np.zeros((n, 1)), logits=logits), None, M.Extractor('e', dict), ('isc',))
    assert row['ISC splits'] == parts and row['ISC'] == pytest.approx(np.mean(scores))


def adm_precision_recall(real, fake, k=3):
    "ADM's evaluator in numpy, distances in half precision where they fit."
    def distances(U, V):
        u, v = U.astype(np.float16), V.astype(np.float16)
        with np.errstate(over='ignore', invalid='ignore'):
            nu, nv = (np.square(o).astype(np.float32).sum(1).astype(np.float16) for o in (u, v))
            d = np.maximum(nu[:, None] - 2*(u.astype(np.float32) @ v.astype(np.float32).T).astype(np.float16) + nv[None], np.float16(0))
        if np.isfinite(d).all(): return d.astype(np.float32)
        return np.maximum(np.square(U).sum(1)[:, None] - 2*U @ V.T + np.square(V).sum(1)[None], 0)
    radii = [np.sort(distances(o, o), 1)[:, k] for o in (real, fake)]
    d = distances(real, fake)
    return (d <= radii[0][:, None]).any(0).mean(), (d <= radii[1][None]).any(1).mean()


@pytest.mark.parametrize('scale, offset', [(1., 0.), (3., .4), (100., 0.)])
def test_precision_in_half_precision_is_adms(scale, offset):
    rng = np.random.default_rng(0)
    real, fake = (rng.normal(size=(n, 48)).astype(np.float32)**2*scale + offset for n in (400, 300))
    fake *= .9
    got, plain = M.precision_recall(fake, real, half=True), M.precision_recall(fake, real)
    assert got == pytest.approx(adm_precision_recall(real, fake), abs=2/300) # sums may be taken in another order, and a tie fall otherwise
    if scale == 3: assert got != plain # ties count as inside
    if scale == 100: assert got == pytest.approx(plain, abs=2/300) # half precision overflows: single is taken


def test_precision_is_torch_fidelitys():
    from torch_fidelity.metric_prc import calculate_precision_recall_part
    rng = np.random.default_rng(1)
    real, fake = rng.normal(size=(2100, 6)).astype(np.float32), rng.normal(size=(500, 6)).astype(np.float32)*.8 + .3
    theirs = calculate_precision_recall_part(torch.tensor(fake), torch.tensor(real), 3, 700)
    assert M.precision_recall(fake, real) == pytest.approx(theirs, abs=1/500)


def test_precision_and_recall_of_far_and_equal_crowds():
    x = np.random.default_rng(0).normal(size=(300, 4)).astype(np.float32)
    assert M.precision_recall(x, x) == (1, 1)
    assert M.precision_recall(x + 100, x) == (0, 0)
    precision, recall = M.precision_recall(x[:100]*.1, x) # a narrow crowd: all plausible, most is missing
    assert precision > .95 and recall < .3


# ---- images ----

def pictures(n=24, channels=3, size=32, seed=0):
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, channels, 4, 4, generator=g)
    return (torch.nn.functional.interpolate(coarse, size=size, mode='bilinear')*255).to(torch.uint8)


def test_folder_errors(tmp_path):
    with pytest.raises(ValueError, match='no .png'): list(M.image_batches(tmp_path))
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path/'a.png')
    Image.fromarray(np.zeros((4, 5), np.uint8)).save(tmp_path/'b.png')
    with pytest.raises(ValueError, match='b.png'): list(M.image_batches(tmp_path))
    (tmp_path/'b.png').write_bytes(b'\x89PNG broken')
    with pytest.raises(ValueError, match='not a readable picture'): list(M.image_batches(tmp_path))


def test_folder_is_read_in_the_order_of_names(tmp_path):
    x = pictures(12, 1, 8)
    for i in torch.randperm(12).tolist(): Image.fromarray(x[i, 0].numpy()).save(tmp_path/f'{i:03d}.png')
    assert torch.equal(torch.cat(list(M.image_batches(tmp_path, 5))), x)


@pytest.mark.parametrize('keys,says', [
    (dict(arr_0=np.zeros((2, 4, 4, 3), np.uint8)), "lacks ['mu', 'sigma']"), (dict(mu=np.zeros(3)), "lacks ['sigma']"),
    (dict(mu=np.zeros(3), sigma=np.eye(2)), 'mu has shape (3,)'), (dict(mu=np.zeros(2), sigma=np.full((2, 2), np.inf)), 'NaN or infinite')])
def test_wrong_reference(tmp_path, keys, says):
    np.savez(tmp_path/'ref.npz', **keys)
    with pytest.raises(ValueError) as e: M.load_reference(tmp_path/'ref.npz')
    assert says in str(e.value) and 'ref.npz' in str(e.value)


def test_reference_with_pickled_objects_is_refused(tmp_path):
    np.savez(tmp_path/'ref.npz', mu=np.array([{}], object), sigma=np.eye(1))
    with pytest.raises(ValueError, match='ref.npz holds more than numbers'): M.load_reference(tmp_path/'ref.npz')


# ---- Inception, with random weights ----

@pytest.fixture(scope='module')
def inception_file(tmp_path_factory):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Random(FeatureExtractorInceptionV3):
        def load_state_dict(self, state): return None
    empty = io.BytesIO(); torch.save({}, empty); empty.seek(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Random('x', ['2048'], feature_extractor_weights_path=empty)
        for k, v in net.state_dict().items():
            if k.endswith('conv.weight'): v.normal_(std=(2/v[0].numel())**.5)
    path = tmp_path_factory.mktemp('inception')/'weights.pth'
    torch.save(net.state_dict(), path)
    return path


@pytest.fixture(scope='module')
def inception(inception_file): return M.inception_extractor(inception_file, check=False)


def test_inception_numbers_are_torch_fidelitys(inception, inception_file):
    import torch_fidelity
    a, b = pictures(12, seed=1), pictures(12, seed=2)
    ours = M.evaluate_images(a, b, inception, splits=3)
    M.fidelity_inception()
    common = dict(input1=torch.utils.data.Subset(a, range(12)), input2=torch.utils.data.Subset(b, range(12)), samples_shuffle=False, cuda=False,
                  verbose=False, cache=False, save_cpu_ram=True, isc_splits=3, feature_extractor='inception-v3-spatial', feature_extractor_weights_path=str(inception_file))
    first = torch_fidelity.calculate_metrics(isc=True, fid=True, prc=True, **common)
    second = torch_fidelity.calculate_metrics(fid=True, feature_layer_fid='spatial', **common)
    assert ours['FID'] == pytest.approx(first['frechet_inception_distance'], rel=1e-4)
    assert ours['sFID'] == pytest.approx(second['frechet_inception_distance'], rel=1e-4)
    assert ours['ISC'] == pytest.approx(first['inception_score_mean'], rel=1e-6)
    assert ours['precision'] == first['precision'] and ours['recall'] == first['recall']


def test_sfid_features_are_seven_channels_of_mixed_6d_channel_last(inception_file, inception):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    net = FeatureExtractorInceptionV3('y', ['logits'], feature_extractor_weights_path=str(inception_file))
    seen = {}
    net.Mixed_6d.register_forward_hook(lambda m, i, o: seen.update(block=o)) # branch1x1 comes first in the block's output
    x = pictures(2, size=40)
    net(x)
    got = inception.spatial(x)
    assert got.shape == (2, 2023) and (got >= 0).all()
    expected = np.stack([[seen['block'][n, c, i, j] for i in range(17) for j in range(17) for c in range(7)] for n in range(2)])
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_inception_weights_are_checked(inception_file, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match='another or a damaged file'): M.inception_extractor(inception_file)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    with pytest.raises(FileNotFoundError, match='weights-inception-2015-12-05-6726825d.pth'): M.get_extractor('inception')


def test_malicious_weights_run_nothing(tmp_path):
    class Evil:
        def __reduce__(self): return os.mkdir, (str(tmp_path/'executed'),)
    (tmp_path/'evil.pth').write_bytes(pickle.dumps(Evil()))
    torch.save({'x': Evil()}, tmp_path/'evil2.pth')
    for name in 'evil.pth', 'evil2.pth':
        with pytest.raises(ValueError, match=f'{name} is damaged, or holds more than tensors'): M.inception_extractor(tmp_path/name, check=False)
    assert not (tmp_path/'executed').exists()


# ---- plugging in ----

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = torch.nn.Conv2d(1, 8, 5, 4), torch.nn.Linear(8, 10)
    def maps(self, x): return self.conv(x)[..., :2, :2].relu()
    def features(self, x): return self.maps(x).mean((2, 3))
    def forward(self, x): return self.fc(self.features(x))


def test_a_classifier_serves_both_doors():
    import torch_fidelity
    with torch.random.fork_rng():
        torch.manual_seed(0)
        extractor = M.classifier_extractor(Net(), 'test-net')
    a, b = pictures(40, 1, seed=1), pictures(40, 1, seed=2)
    ours = M.evaluate_images(a, M.feature_stats(b, extractor), extractor, splits=10)
    assert extractor.spatial(a).shape == (40, 8) # 8 features over 4 positions: 2 channels
    theirs = torch_fidelity.calculate_metrics(input1=torch.utils.data.Subset(a, range(40)), input2=torch.utils.data.Subset(b, range(40)), isc=True, fid=True,
                                              prc=True, feature_extractor=M.register_fidelity(extractor), samples_shuffle=False, cuda=False, verbose=False,
                                              cache=False, save_cpu_ram=True)
    assert ours['FD'] == pytest.approx(theirs['frechet_inception_distance'], rel=1e-3, abs=1e-7)
    assert ours['ISC'] == pytest.approx(theirs['inception_score_mean'], rel=1e-6)
    assert ours['precision'] == pytest.approx(theirs['precision'])
    assert ours.attrs['not_computed'] == {}


def test_not_computed_says_why(tmp_path):
    extractor = M.Extractor('half', lambda x: dict(features=x.float().mean((2, 3))), channels=3)
    np.savez(tmp_path/'ref.npz', mu=np.zeros(3), sigma=np.eye(3))
    row = M.evaluate_images(pictures(), tmp_path/'ref.npz', extractor)
    assert row['FD'] > 0 and row[['sFD', 'ISC', 'precision']].isna().all()
    assert 'arr_0' in row.attrs['not_computed']['precision'] and 'spatial' in row.attrs['not_computed']['sFD']


def test_accuracy_refuses_labels_out_of_range():
    found = M.FeatureSet(np.zeros((3, 1)), logits=np.eye(3))
    extractor = M.Extractor('e', dict)
    assert M.class_accuracy(found, [0, 1, 0], extractor) == pytest.approx(2/3)
    for labels, says in (([0, 1, 3], 'knows 0..2'), ([0, -1, 2], 'span -1'), ([0, 1], 'for 3 images')):
        with pytest.raises(ValueError) as e: M.class_accuracy(found, labels, extractor)
        assert says in str(e.value)


# ---- pairs ----

def test_psnr_pools_the_error_over_all_images():
    a = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    b = a.clone(); b[0] = 51 # one image of four off by 0.2
    assert M.paired_psnr(a, b) == pytest.approx(-10*np.log10(.04/4))
    assert M.paired_psnr(a.float()/255, b.float()/255) == pytest.approx(M.paired_psnr(a, b))
    assert M.paired_psnr(a, a) == float('inf')


def test_ssim_by_scipy():
    a, b = pictures(3, 3, 24, 1), pictures(3, 3, 24, 2)
    def local(v): return scipy.ndimage.gaussian_filter(v, 1.5, truncate=3.5)[5:-5, 5:-5]
    for got, x, y in zip(M.paired_ssim(a, b), a.numpy()/255., b.numpy()/255.):
        per_channel = []
        for u, v in zip(x, y):
            mu, mv = local(u), local(v)
            vu, vv, uv = local(u*u) - mu**2, local(v*v) - mv**2, local(u*v) - mu*mv
            per_channel.append(((2*mu*mv + 1e-4)*(2*uv + 9e-4)/((mu**2 + mv**2 + 1e-4)*(vu + vv + 9e-4))).mean())
        assert got == pytest.approx(np.mean(per_channel), rel=1e-6)


def test_lpips_is_torch_fidelitys(tmp_path, monkeypatch):
    import torchvision
    from torch_fidelity import sample_similarity_lpips as tf
    with torch.random.fork_rng():
        torch.manual_seed(0)
        small = torch.nn.Module(); small.features = torchvision.models.vgg16(weights=None).features # without the 124M weights of its classifier
        heads = {f'lin{i}.model.1.weight': torch.rand(1, c, 1, 1) for i, c in enumerate([64, 128, 256, 512, 512])}
    torch.save(small.state_dict(), tmp_path/'vgg.pth'); torch.save(heads, tmp_path/'lpips.pth')
    monkeypatch.setattr(torchvision.models, 'vgg16', lambda weights=None: small)
    distance = M.lpips_distance(tmp_path/'vgg.pth', tmp_path/'lpips.pth', check=False)
    monkeypatch.setattr(tf, 'load_state_dict_from_url', lambda *a, **k: heads)
    monkeypatch.setattr(tf, 'torchvision_load_pretrained_vgg16', lambda: small)
    a, b = pictures(3, 3, 32, 1), pictures(3, 3, 32, 2)
    theirs = tf.SampleSimilarityLPIPS('lpips')(a, b).flatten()
    np.testing.assert_allclose(M.paired_lpips(a, b, distance), theirs.numpy(), rtol=1e-5)
    assert (M.paired_lpips(a, a, distance) == 0).all()


def test_bootstrap_is_repeatable_and_resamples_rows_together():
    x = np.random.default_rng(0).normal(size=(50, 2))
    assert M.bootstrap_ci(x[:, 0], seed=3) == M.bootstrap_ci(x[:, 0], seed=3) != M.bootstrap_ci(x[:, 0], seed=4)
    same = M.bootstrap_ci((x, x), lambda a, b: np.abs(a - b).max(), n_resamples=50)
    assert same == (0, 0, 0)
