"""Damaged, foreign and hostile model folders: refused with file and tensor named, or loaded equal. Never a crash, never silent garbage.

The long run is resumable: `python tests/test_loader_attacks.py --n 10000 --log nbs/results/fuzz_loader.jsonl`.
"""
import aquatic_nb # noqa: F401  first: torchvision may lack its operators
import argparse, collections, json, random, re, resource, shutil, struct, sys, tempfile, time
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from aquatic_nb.act import attach_act
from aquatic_nb.format import CHECKSUMS, checksums
from aquatic_nb.hub import attach, load_quantized, save_quantized
from packed_models import C, X, conditional, pack_model, run

WEIGHTS = 'diffusion_pytorch_model.safetensors'
REFUSALS = (ValueError, OSError, RuntimeError) # RuntimeError: torch and diffusers, where the architecture of a changed config.json cannot be built
INSIDE = (TypeError, KeyError, AttributeError, IndexError, ZeroDivisionError, NotImplementedError) # from diffusers itself, where the config is no config
LOADERS = dict(diffusers=UNet2DConditionModel.from_pretrained, ours=load_quantized)

def make_model():
    "Every kind of layer, activation ranges included."
    batches = [dict(sample=X, timestep=torch.tensor(t), encoder_hidden_states=C) for t in (1, 99)]
    return attach(attach_act(pack_model(conditional()), 8, batches), bits=6)

@pytest.fixture(scope='module')
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp('attacks')/'good'
    save_quantized(make_model(), folder)
    return folder

def tensors_of(folder): return load_file(folder/WEIGHTS)
def entry_of(folder): return json.loads((folder/'config.json').read_text()).get('quantization_config', {})

def rewrite(folder, tensors, sums=True):
    "Store other tensors, with checksums that fit where `sums`: what a careful attacker or a broken converter does."
    tensors = {k: v.contiguous() for k, v in tensors.items()}
    if sums: tensors[CHECKSUMS] = checksums({k: v for k, v in tensors.items() if k != CHECKSUMS}, entry_of(folder))
    save_file(tensors, folder/WEIGHTS, metadata={'format': 'pt'})

def edit_header(folder, change):
    "Change the JSON header in place, bytes of the tensors left alone."
    raw = (folder/WEIGHTS).read_bytes()
    n = struct.unpack('<Q', raw[:8])[0]
    head = json.loads(raw[8:8+n])
    head = change(head) or head
    text = json.dumps(head).encode()
    (folder/WEIGHTS).write_bytes(struct.pack('<Q', len(text)) + text + raw[8+n:])

def edit_config(folder, change):
    path = folder/'config.json'
    config = json.loads(path.read_text())
    config = change(config) or config
    path.write_text(json.dumps(config))

def edit_tensors(change, sums=True):
    def attack(folder):
        t = tensors_of(folder)
        t = change(t) or t
        rewrite(folder, t, sums)
    return attack

LAYER = 'mid_block.resnets.0.conv1'
def set_value(name, value):
    def change(t): t[name] = t[name].clone(); t[name].view(-1)[0] = value
    return edit_tensors(change)
def replace(name, make):
    def change(t): t[name] = make(t[name])
    return edit_tensors(change)
def drop(name): return edit_tensors(lambda t: {k: v for k, v in t.items() if k != name})
def header(name, **kw): return lambda folder: edit_header(folder, lambda h: h[name].update(kw))
def config(**kw): return lambda folder: edit_config(folder, lambda c: c.update(kw))
def entry(**kw): return lambda folder: edit_config(folder, lambda c: c['quantization_config'].update(kw))
def cut(n): return lambda folder: (folder/WEIGHTS).write_bytes((folder/WEIGHTS).read_bytes()[:n])
def flip(at, bit=3):
    def attack(folder):
        raw = bytearray((folder/WEIGHTS).read_bytes())
        raw[at] ^= 1 << bit
        (folder/WEIGHTS).write_bytes(raw)
    return attack

def first(tensors, end, dtype=None): return next(n for n in sorted(tensors) if n.endswith(end) and (dtype is None or tensors[n].dtype == dtype))
def some(end, make, dtype=None):
    def change(t): n = first(t, end, dtype); t[n] = make(t[n])
    return edit_tensors(change)
def poke(t, v): t = t.clone(); t.view(-1)[0] = v; return t

ATTACKS = { # name -> (what is done, what the message must contain)
    'empty file': (cut(0), WEIGHTS), 'cut in the header': (cut(200), WEIGHTS), 'cut in the data': (cut(-500), WEIGHTS),
    'appended bytes': (lambda f: (f/WEIGHTS).write_bytes((f/WEIGHTS).read_bytes() + b'x'*64), WEIGHTS),
    'flipped bit, last tensor': (flip(-40), 'checksum'), 'flipped bit, middle': (flip(-20000), 'checksum'),
    'header length of terabytes': (lambda f: (f/WEIGHTS).write_bytes(struct.pack('<Q', 2**42) + (f/WEIGHTS).read_bytes()[8:]), WEIGHTS),
    'header is no JSON': (lambda f: (f/WEIGHTS).write_bytes(struct.pack('<Q', 8) + b'not json' + b'\0'*64), WEIGHTS),
    'shape of terabytes': (header(f'{LAYER}.scales', shape=[2**42]), WEIGHTS), 'negative shape': (header(f'{LAYER}.scales', shape=[-16]), WEIGHTS),
    'overflowing shape': (header(f'{LAYER}.scales', shape=[2**33, 2**33]), WEIGHTS), 'unknown dtype': (header(f'{LAYER}.scales', dtype='F13'), WEIGHTS),
    'dtype of the same size': (header(f'{LAYER}.scales', dtype='BF16'), 'checksum'), 'overlapping tensors': (header(f'{LAYER}.scales', data_offsets=[0, 32]), WEIGHTS),
    'renamed tensor': (lambda f: edit_header(f, lambda h: {('evil.scales' if k == f'{LAYER}.scales' else k): v for k, v in h.items()}), 'checksum'),
    'exchanged tensors': (edit_tensors(lambda t: t.update({f'{LAYER}.bias': t['mid_block.resnets.0.conv2.bias'], 'mid_block.resnets.0.conv2.bias': t[f'{LAYER}.bias']}), sums=False), 'checksum'),
    'no checksums': (edit_tensors(lambda t: {k: v for k, v in t.items() if k != CHECKSUMS}, sums=False), CHECKSUMS),
    'no entry, checksums kept': (lambda f: edit_config(f, lambda c: {k: v for k, v in c.items() if k != 'quantization_config'}), 'is gone'),
    'missing scales': (drop(f'{LAYER}.scales'), LAYER), 'missing codes': (drop(f'{LAYER}.codes_hi'), LAYER), 'missing codebooks': (drop(f'{LAYER}.codebooks'), LAYER),
    'missing norm': (drop('conv_norm_out.weight'), 'conv_norm_out.weight'), 'missing bias': (drop(f'{LAYER}.bias'), f'{LAYER}.bias'), 'missing marker': (drop(f'{LAYER}.weight'), f'{LAYER}.weight'),
    'additional tensor': (edit_tensors(lambda t: t.update(evil=torch.zeros(4))), 'evil'),
    'additional layer': (edit_tensors(lambda t: t.update({'evil.scales': torch.zeros(4).half(), 'evil.codes': torch.zeros(4, 1, 1, dtype=torch.uint8), 'evil.codebooks': torch.zeros(1, 256, 8, dtype=torch.int8)})), 'evil'),
    'scales of another dtype': (replace(f'{LAYER}.scales', lambda t: t.float()), f'{LAYER}.scales'), 'scales of another length': (replace(f'{LAYER}.scales', lambda t: t[:-1]), f'{LAYER}.scales'),
    'codes as int32': (some('.codes', lambda t: t.int()), '.codes'), 'codes too short': (some('.codes_hi', lambda t: t[:-1]), 'expected U8'), 'codes of another shape': (some('.codes', lambda t: t.flatten()), '.codes'),
    'codebooks of 100 entries': (some('.codebooks', lambda t: t[:, :100] if t.shape[1] > 100 else t[:, :3]), 'power of two'), 'codebooks of float32': (some('.codebooks', lambda t: t.float(), torch.float16), 'codebooks'),
    'codebooks of 2 dimensions': (some('.codebooks', lambda t: t[0]), 'codebooks'), 'group size 0': (some('.codebooks', lambda t: t[..., :0]), 'group_size'), 'no codebook': (some('.codebooks', lambda t: t[:0]), 'n_codebooks'),
    '65536 codewords': (some('.codebooks', lambda t: t.new_zeros(1, 65536, 8)), 'codebook_bits'),
    'NaN codebook': (some('.codebooks', lambda t: poke(t, float('nan')), torch.float16), 'NaN'), 'infinite scale': (set_value(f'{LAYER}.scales', float('inf')), f'{LAYER}.scales'),
    'NaN in a norm': (set_value('conv_norm_out.weight', float('nan')), 'conv_norm_out.weight'), 'NaN in a bias': (set_value(f'{LAYER}.bias', float('nan')), f'{LAYER}.bias'),
    'overflowing int8 codebooks': (some('.codebooks', lambda t: torch.full_like(t, 127), torch.int8), 'add up'),
    'zero points too large': (some('.act.zero', lambda t: t + 300), 'zero points'), 'negative ranges': (some('.act.scale', lambda t: -t), 'act'), 'NaN ranges': (some('.act.scale', lambda t: t*float('nan')), 'act'),
    'ranges of other timesteps': (some('.act.timesteps', lambda t: t[:1]), 'act'), 'ranges without timesteps': (some('.act.timesteps', lambda t: t[:0]), 'act'),
    'wider architecture': (config(block_out_channels=[16, 32]), 'expected a floating dtype'), 'enormous architecture': (config(block_out_channels=[2**20, 2**20]), 'can be built'), 'other conditioning': (config(cross_attention_dim=16), 'expected U8'),
    'no such class': (config(_class_name='NoSuchModel'), 'no model class'), 'config is no JSON': (lambda f: (f/'config.json').write_text('{"a": '), 'config.json'), 'config is a list': (lambda f: (f/'config.json').write_text('[1, 2]'), 'no readable JSON'),
    'another method': (entry(quant_method='gguf'), "expected 'aquatic'"), 'unknown method': (entry(quant_method='evil'), 'evil'), 'newer format': (entry(format_version=2), 'format_version=2'), 'format 0': (entry(format_version=0), 'format_version=0'),
    'format as text': (entry(format_version='1'), 'format_version'), 'unknown option': (entry(group_size=0), 'group_size'), 'bits out of range': (entry(bits=40), 'bits=40'), 'bits as text': (entry(bits='2'), "bits='2'"),
    'act_bits out of range': (entry(act_bits=40), 'act_bits=40'), 'other act_bits': (entry(act_bits=7), 'quantization_config'), 'no act_bits': (entry(act_bits=None), 'quantization_config'),
    'sharing forgotten': (lambda f: edit_config(f, lambda c: c['quantization_config'].pop('shared_codebooks') and None), 'not the one this model was saved with'), 'sharing as list': (entry(shared_codebooks=['a']), 'shared_codebooks'),
    'sharing with a stranger': (entry(shared_codebooks={'evil': [LAYER]}), 'not the one this model was saved with'), 'sharing with itself': (entry(shared_codebooks={LAYER: [LAYER]}), 'twice'),
    'weights missing': (lambda f: (f/WEIGHTS).unlink(), 'no .safetensors file'), 'weights are a folder': (lambda f: ((f/WEIGHTS).unlink(), (f/WEIGHTS).mkdir()), 'Is a directory'),
    'index leads out': (lambda f: (f/'diffusion_pytorch_model.safetensors.index.json').write_text(json.dumps(dict(metadata={}, weight_map={'a': f'../good/{WEIGHTS}'}))), 'leads out of the folder'),
    'index of nothing': (lambda f: (f/'diffusion_pytorch_model.safetensors.index.json').write_text('{}'), 'no readable index'),
    'second copy of a shard': (lambda f: (shutil.copy(f/WEIGHTS, f/'b.safetensors'), (f/'diffusion_pytorch_model.safetensors.index.json').write_text(json.dumps(dict(metadata={}, weight_map={'conv_in.weight': WEIGHTS, 'conv_in.bias': 'b.safetensors'})))), 'also in'),
    'a pickle instead': (lambda f: ((f/WEIGHTS).unlink(), torch.save(conditional().state_dict(), f/'diffusion_pytorch_model.bin')), 'no .safetensors file'),
    'a symlink to nowhere': (lambda f: ((f/WEIGHTS).unlink(), (f/WEIGHTS).symlink_to('/nonexistent')), 'No such file'),
}

@pytest.mark.parametrize('name', ATTACKS)
def test_attack(good, tmp_path, name):
    attack, says = ATTACKS[name]
    assert says, 'an attack is refused for a reason that the message tells'
    folder = tmp_path/'m'
    shutil.copytree(good, folder)
    attack(folder)
    for how, load in LOADERS.items():
        if how == 'diffusers' and name == 'no such class': continue # diffusers was told the class
        with pytest.raises(REFUSALS if how == 'ours' else REFUSALS + INSIDE) as e: load(folder)
        text = str(e.value)
        if how == 'ours' or says in ('checksum', 'NaN'): assert says in text or 'Unable to load' in text, f'{how}: {text}'
        assert len(text) < 20_000

def test_good_folder_loads(good, tmp_path):
    shutil.copytree(good, tmp_path/'m')
    for load in LOADERS.values(): assert torch.equal(run(load(tmp_path/'m')), run(load(good)))
    (tmp_path/'linked').mkdir() # as in the cache of the hub: links to blobs
    for f in good.iterdir(): (tmp_path/'linked'/f.name).symlink_to(f)
    for load in LOADERS.values(): assert torch.equal(run(load(tmp_path/'linked')), run(load(good)))

def test_checksums_can_be_skipped(good, tmp_path, monkeypatch):
    shutil.copytree(good, tmp_path/'m')
    flip(-20000)(tmp_path/'m')
    monkeypatch.setenv('AQUATIC_VERIFY', '0')
    load_quantized(tmp_path/'m')

def test_terabytes_are_not_allocated(good, tmp_path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in ('shape of terabytes', 'overflowing shape', 'enormous architecture', 'header length of terabytes'):
        shutil.rmtree(tmp_path/'m', ignore_errors=True); shutil.copytree(good, tmp_path/'m')
        ATTACKS[name][0](tmp_path/'m')
        with pytest.raises(REFUSALS, match=re.escape(ATTACKS[name][1])): load_quantized(tmp_path/'m')
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**19 # kB: half a GB

# the fuzzer

JUNK = [None, 0, -1, 1, 3, 2**31, 2**63, 1e300, float('nan'), '', 'x', 'é\u0000', [], [0], [8, 16, 32], {}, {'a': 1}, True, [[1]], '../../etc/passwd']

def mutate(folder, r):
    "One random change to a model folder; returns its name."
    path = folder/WEIGHTS
    kind = r.choice(['bit', 'bit', 'bytes', 'cut', 'insert', 'swap', 'header', 'header', 'header text', 'tensor', 'tensor', 'config', 'entry', 'entry'])
    raw = bytearray(path.read_bytes())
    n = struct.unpack('<Q', raw[:8])[0]
    if kind == 'bit': raw[r.randrange(len(raw))] ^= 1 << r.randrange(8)
    elif kind == 'bytes': a = r.randrange(len(raw)); raw[a:a+r.randrange(1, 64)] = r.randbytes(r.randrange(1, 64))
    elif kind == 'cut': a = r.randrange(len(raw)); del raw[a:a+r.choice([1, 8, 64, 10**6])]
    elif kind == 'insert': a = r.randrange(len(raw)); raw[a:a] = r.randbytes(r.choice([1, 2, 8, 64]))
    elif kind == 'swap':
        k = r.randrange(1, 200); a, b = (8 + n + r.randrange(len(raw) - 8 - n - k) for _ in range(2))
        raw[a:a+k], raw[b:b+k] = raw[b:b+k], raw[a:a+k]
    elif kind == 'header text': raw[8 + r.randrange(n)] = r.randrange(256)
    if kind in ('bit', 'bytes', 'cut', 'insert', 'swap', 'header text'): path.write_bytes(raw); return kind
    if kind == 'header': return kind + ' ' + _mutate_header(folder, r)
    if kind == 'tensor': return kind + ' ' + _mutate_tensor(folder, r)
    return kind + ' ' + _mutate_config(folder, r, kind)

def _mutate_header(folder, r):
    what = r.choice(['rename', 'drop', 'dtype', 'shape', 'offsets', 'exchange', 'junk', 'metadata'])
    def change(h):
        names = [k for k in h if k != '__metadata__']
        a, b = r.sample(names, 2)
        if what == 'rename': h[r.choice([a + 'x', a[1:], 'conv_in.weight2', '', b, '__metadata__'])] = h.pop(a)
        elif what == 'drop': h.pop(a)
        elif what == 'dtype': h[a]['dtype'] = r.choice(['F16', 'BF16', 'I8', 'U8', 'F32', 'I64', 'F8_E4M3', 'BOOL', 'X', 7])
        elif what == 'shape': h[a]['shape'] = r.choice([h[a]['shape'][::-1], h[a]['shape'] + [1], [1] + h[a]['shape'], [2**40], [2**32, 2**32], [-1], [], [0], 'x', h[b]['shape']])
        elif what == 'offsets': h[a]['data_offsets'] = r.choice([h[b]['data_offsets'], [0, 0], [0, 2**50], [5, 1], [-4, 4], None, [o + 1 for o in h[a]['data_offsets']]])
        elif what == 'exchange': h[a], h[b] = h[b], h[a]
        elif what == 'junk': h[a] = r.choice(JUNK)
        elif what == 'metadata': h['__metadata__'] = r.choice([{}, {'format': 'tf'}, {'format': 'pt', 'x': 'y'}, {'format': 3}, None, []])
    edit_header(folder, change)
    return what

def _mutate_tensor(folder, r):
    what = r.choice(['nan', 'inf', 'dtype', 'shape', 'drop', 'add', 'huge int8', 'act', 'codebook size'])
    t = tensors_of(folder)
    names = [n for n in t if n != CHECKSUMS and t[n].numel()]
    floats = [n for n in names if t[n].is_floating_point()]
    n = r.choice(floats if what in ('nan', 'inf') else names)
    if what in ('nan', 'inf'): t[n].view(-1)[r.randrange(t[n].numel())] = float(what)*r.choice([1, -1])
    elif what == 'dtype': t[n] = t[n].to(r.choice([d for d in (torch.float64, torch.int32, torch.int16, torch.bool) if d != t[n].dtype]))
    elif what == 'shape': t[n] = r.choice([t[n][None], t[n].flatten()[:-1], torch.cat([t[n], t[n]]), t[n][:0], t[n].flatten()[0]])
    elif what == 'drop': del t[r.choice([n, CHECKSUMS, *[k for k in t if not t[k].numel()][:3]])]
    elif what == 'add': t[r.choice([n + '2', 'evil', 'conv_in.codes', 'conv_in.scales', f'{LAYER}.act.scale2', 'aquatic.more'])] = r.choice([torch.zeros(3), t[n].clone(), torch.empty(0)])
    elif what == 'huge int8': n = first(t, '.codebooks', torch.int8); t[n] = torch.full_like(t[n], 100)
    elif what == 'act': n = r.choice([k for k in names if '.act.' in k and not k.endswith('timesteps')]); t[n] = t[n]*r.choice([-1., float('nan')]) - 1
    elif what == 'codebook size': n = r.choice([k for k in names if k.endswith('.codebooks')]); t[n] = t[n][:, :r.choice([0, 1, 3, 5, t[n].shape[1]//2])]
    rewrite(folder, t, sums=what != 'drop' or CHECKSUMS in t)
    return what

CONFIG_KEYS = ['block_out_channels', 'in_channels', 'cross_attention_dim', 'layers_per_block', 'attention_head_dim', 'down_block_types', 'up_block_types', 'norm_num_groups', 'act_fn', 'time_embedding_type', '_class_name', 'mid_block_type']

def _mutate_config(folder, r, kind):
    where = {}
    def change(c):
        target = c['quantization_config'] if kind == 'entry' else c
        key = r.choice(sorted(target) if kind == 'entry' else CONFIG_KEYS)
        where['key'] = key
        op = r.choice(['junk', 'drop', 'add'])
        if op == 'drop': target.pop(key)
        elif op == 'add': target[r.choice(['group_size', 'codebook_bits', 'pickle', '__class__'])] = r.choice(JUNK) if kind == 'entry' else 1
        else: target[key] = r.choice(JUNK)
    edit_config(folder, change)
    return where['key']

def one(good, scratch, seed, reference):
    "Mutate, load, judge: 'refused', 'equal', or an AssertionError."
    r = random.Random(seed)
    shutil.rmtree(scratch, ignore_errors=True); shutil.copytree(good, scratch)
    kind = mutate(scratch, r)
    how = r.choice(sorted(LOADERS))
    load = LOADERS[how]
    start = time.process_time()
    try: model = load(scratch)
    except REFUSALS + (INSIDE if how == 'diffusers' and kind.split()[0] in ('config', 'entry') else ()) as e:
        assert len(str(e)) > 10 or kind.startswith('config'), f'seed {seed}: {kind}: says nothing: {e!r}'
        outcome = 'refused'
    else:
        state = model.state_dict()
        assert not any(t.is_meta for t in state.values()), f'seed {seed}: {kind}: meta tensors'
        assert state.keys() == reference.keys() and all(torch.equal(state[n], reference[n]) for n in state), f'seed {seed}: {kind}: loaded something else'
        outcome = 'equal'
    assert time.process_time() - start < 60, f'seed {seed}: {kind}: took too long'
    return kind, outcome

def quiet(): # hundreds of refused files are no news
    import warnings
    from diffusers.utils import logging
    logging.set_verbosity(logging.CRITICAL + 10 if hasattr(logging, 'CRITICAL') else 60)
    warnings.simplefilter('ignore')

@pytest.mark.parametrize('part', range(6))
def test_fuzz(good, tmp_path, part):
    quiet()
    reference = load_quantized(good).state_dict()
    seen = collections.Counter(one(good, tmp_path/'m', 1000*part + i, reference)[1] for i in range(40))
    assert seen['refused'] > 20

def main(n, log, good=None):
    "The long run; goes on where an earlier one stopped."
    quiet()
    log = Path(log); log.parent.mkdir(parents=True, exist_ok=True)
    done = sum(json.loads(o)['n'] for o in log.read_text().splitlines()) if log.exists() else 0
    with tempfile.TemporaryDirectory() as tmp:
        good = save_quantized(make_model(), Path(tmp)/'good')
        reference = load_quantized(good).state_dict()
        while done < n:
            k, start, seen = min(250, n - done), time.time(), collections.Counter()
            for seed in range(done, done + k): seen[' '.join(one(good, Path(tmp)/'m', seed, reference))] += 1
            with open(log, 'a') as f: f.write(json.dumps(dict(first=done, n=k, seconds=round(time.time() - start, 1), rss_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss//1024, seen=dict(sorted(seen.items())))) + '\n')
            done += k
            print(done, dict(seen), file=sys.stderr)

@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_fuzz_long(tmp_path): main(10_000, tmp_path/'fuzz.jsonl')

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--n', type=int, default=10_000)
    parser.add_argument('--log', default='fuzz_loader.jsonl')
    main(**vars(parser.parse_args()))
