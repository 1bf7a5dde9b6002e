"""`load_ldm4` against an independent reimplementation of the original network (tests/ldm_original.py)."""
import os
import pickle
import sys
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml

from aquatic_nb import zoo
from aquatic_nb.models import ldm
from aquatic_nb.core import generator, sha256_of

sys.path.insert(0, str(Path(__file__).parent))
from ldm_original import LatentDiffusion, read_keys # noqa: E402

DATA = Path(__file__).parent/'data'
SMALL = ldm.LDMConfig(model_channels=32, channel_mult=(1, 2, 3), attention_resolutions=(4, 2), context_dim=24, image_size=8, n_classes=12,
                      ch=32, ch_mult=(1, 2, 4), n_embed=64)
HEADS = replace(SMALL, num_heads=-1, num_head_channels=16, channel_mult=(1, 2), attention_resolutions=(1, 2), num_res_blocks=1,
                transformer_depth=2, vq_res_blocks=1, ch_mult=(1, 2), scale_factor=.5)


def original(cfg, seed=0):
    "The original network with random weights: spread norms and biases too, so that no two of them can be swapped unseen."
    model = LatentDiffusion(cfg).eval().requires_grad_(False)
    g = generator(seed, 'original')
    for name, p in model.named_parameters():
        if p.ndim > 1: p.copy_(torch.randn(p.shape, generator=g)*(1. if 'embedding' in name else p[0].numel()**-.5))
        else: p.copy_(torch.randn(p.shape, generator=g)*.2 + (1 if name.endswith('weight') else 0))
    return model


def lightning(path, state, **extra):
    "Save as Lightning does: the tensors among other things."
    torch.save({'epoch': 3, 'global_step': 1234, 'pytorch-lightning_version': '1.4.2', 'state_dict': state, 'optimizer_states': [{'lr': .1}],
                'lr_schedulers': [], **extra}, path)
    return path


@pytest.fixture(scope='module', params=[SMALL, HEADS], ids=['ldm4', 'heads'])
def pair(request, tmp_path_factory):
    model = original(request.param)
    path = lightning(tmp_path_factory.mktemp('ldm')/'model.ckpt', model.state_dict())
    return request.param, model, path, zoo.load_ldm4(path, request.param, verbose=False)


def noise(cfg, n=2, seed=0): return torch.randn(n, cfg.channels, cfg.image_size, cfg.image_size, generator=generator(seed, 'x'))


@torch.no_grad()
def test_unet_parity(pair):
    cfg, model, _, pipe = pair
    labels = torch.tensor([3, cfg.n_classes - 1])
    for t in (1, 501, 951):
        ours = pipe.unet(noise(cfg), t, pipe.class_embedding(labels)).sample
        theirs = model.eps(noise(cfg), torch.tensor([t, t]), labels)
        assert theirs.std() > .1 and (ours - theirs).abs().max() < 1e-5


@torch.no_grad()
def test_first_stage_parity(pair):
    cfg, model, _, pipe = pair
    z = noise(cfg)
    theirs = model.first_stage_model.decode(z/cfg.scale_factor)
    assert theirs.std() > .1 and (pipe.decode(z) - theirs).abs().max() < 1e-5
    images = theirs.clamp(-1, 1)
    assert (pipe.encode(images) - model.first_stage_model.encode(images)*cfg.scale_factor).abs().max() < 1e-5


def test_class_embedding_parity(pair):
    cfg, model, _, pipe = pair
    assert pipe.class_embedding.embedding.weight.equal(model.cond_stage_model.embedding.weight)
    assert pipe.class_embedding.null_class == cfg.n_classes - 1


def test_sampling_parity(pair):
    "The whole walk, guided, against a DDIM written from the formula; before decoding, as quantization of latents is not continuous."
    cfg, model, _, pipe = pair
    pipe.set_progress_bar_config(disable=True)
    labels, x = torch.tensor([1, 5]), noise(cfg, seed=1)
    seen = []
    pipe(labels, 5, 3., latents=x, output_type='latent', callback_on_step_end=lambda p, i, t, kw: seen.append((int(t), kw['latents'])))
    assert [t for t, _ in seen] == [801, 601, 401, 201, 1]
    model.first_stage_model.decode, decode = lambda z: z*cfg.scale_factor, model.first_stage_model.decode
    theirs = model.sample(x, labels, 5, 3.)
    model.first_stage_model.decode = decode
    scale = theirs.abs().max()
    assert (seen[-1][1] - theirs).abs().max() < 1e-4*scale


def test_same_as_diffusers_own_conversion(pair):
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
    cfg, model, _, pipe = pair
    config = dict(pipe.unet.config)
    config['upcast_attention'] = False
    theirs = convert_ldm_unet_checkpoint({k: v.clone() for k, v in model.state_dict().items()}, config)
    ours = pipe.unet.state_dict()
    assert set(theirs) == set(ours) and all(ours[k].equal(v) for k, v in theirs.items())


def test_names_and_shapes_of_ldm4():
    "The map covers the full-size model's names and shapes, written out as data, exactly."
    stored = read_keys(DATA/'ldm4_keys.csv')
    wanted = ldm.ldm_key_map(ldm.LDMConfig())
    assert {k: v for k, v in stored.items() if k not in ldm.SCHEDULE_KEYS} == {k: shape for k, (_, _, shape) in wanted.items()}
    assert set(stored) - set(wanted) <= set(ldm.SCHEDULE_KEYS)
    with torch.device('meta'): assert stored == {k: tuple(v.shape) for k, v in LatentDiffusion(ldm.LDMConfig()).state_dict().items()}


def test_yaml_and_dictionary_describe_the_same(pair, tmp_path):
    cfg, _, path, pipe = pair
    heads = {'num_heads': cfg.num_heads} if cfg.num_heads != -1 else {'num_head_channels': cfg.num_head_channels}
    unet = dict(image_size=cfg.image_size, in_channels=3, out_channels=3, model_channels=cfg.model_channels, num_res_blocks=cfg.num_res_blocks,
                attention_resolutions=list(cfg.attention_resolutions), channel_mult=list(cfg.channel_mult), use_spatial_transformer=True,
                context_dim=cfg.context_dim, transformer_depth=cfg.transformer_depth, **heads)
    dd = dict(double_z=False, z_channels=3, resolution=32, in_channels=3, out_ch=3, ch=cfg.ch, ch_mult=list(cfg.ch_mult),
              num_res_blocks=cfg.vq_res_blocks, attn_resolutions=[], dropout=0.)
    params = dict(linear_start=.0015, linear_end=.0195, timesteps=1000, channels=3, image_size=cfg.image_size, scale_factor=cfg.scale_factor,
                  unet_config=dict(target='a.B', params=unet), cond_stage_config=dict(params=dict(n_classes=cfg.n_classes, embed_dim=cfg.context_dim)),
                  first_stage_config=dict(params=dict(embed_dim=3, n_embed=cfg.n_embed, ddconfig=dd)))
    file = tmp_path/'config.yaml'
    file.write_text(yaml.safe_dump(dict(model=dict(base_learning_rate=1e-6, target='x.Y', params=params))))
    for config in (file, str(file), yaml.safe_load(file.read_text()), asdict(cfg)):
        assert ldm.ldm_config(config) == cfg
    other = zoo.load_ldm4(path, file, verbose=False)
    assert all(a.equal(b) for a, b in zip(pipe.unet.parameters(), other.unet.parameters()))


def test_converted_folder(pair, tmp_path, capsys):
    cfg, _, path, pipe = pair
    dst = zoo.convert_ldm4(path, tmp_path/'new'/'folder', cfg)
    assert sha256_of(path) in capsys.readouterr().out
    again = zoo.load_ldm4(dst)
    assert again.source_sha256 in capsys.readouterr().out
    for part in ('unet', 'vae', 'class_embedding'):
        ours, theirs = getattr(pipe, part).state_dict(), getattr(again, part).state_dict()
        assert set(ours) == set(theirs) and all(ours[k].equal(v) for k, v in theirs.items())
    settings = lambda p: {k: v for k, v in p.scheduler.config.items() if not k.startswith('_')}
    assert settings(again) == settings(pipe) and again.vae.config.scaling_factor == cfg.scale_factor
    assert not [p for p in dst.rglob('*') if p.suffix in ('.bin', '.pt', '.ckpt', '.pkl')]
    with pytest.raises(ValueError, match='exists and is not empty'): zoo.convert_ldm4(path, dst, cfg)
    (tmp_path/'empty').mkdir()
    with pytest.raises(ValueError, match='model_index.json'): zoo.load_ldm4(tmp_path/'empty')
    zoo.convert_ldm4(path, tmp_path/'empty', cfg, dtype=torch.float16)
    assert zoo.load_ldm4(tmp_path/'empty', dtype=torch.float16, verbose=False).unet.dtype == torch.float16
    assert sorted(p.name for p in tmp_path.iterdir()) == ['empty', 'new'] # no temporary folder is left


def test_scheduler_facts(pair):
    cfg, model, _, pipe = pair
    assert torch.allclose(pipe.scheduler.alphas_cumprod, model.alphas_cumprod, atol=1e-6)
    c = pipe.scheduler.config
    assert (c.beta_schedule, c.steps_offset, c.set_alpha_to_one, c.clip_sample, c.timestep_spacing) == ('scaled_linear', 1, False, False, 'leading')


def ema_of(state, factor=2.):
    out = {'model_ema.decay': torch.tensor(.9999), 'model_ema.num_updates': torch.tensor(7, dtype=torch.int)}
    return out | {'model_ema.' + k.removeprefix('model.').replace('.', ''): v*factor for k, v in state.items() if k.startswith('model.')}


def test_running_average(pair, tmp_path):
    cfg, model, path, pipe = pair
    state = model.state_dict()
    with_ema = lightning(tmp_path/'ema.ckpt', state | ema_of(state))
    weight = pipe.unet.conv_in.weight
    for use, factor in ((None, 2), (True, 2), (False, 1)):
        assert zoo.load_ldm4(with_ema, cfg, use_ema=use, verbose=False).unet.conv_in.weight.equal(weight*factor)
    with pytest.raises(ValueError, match='use_ema=False'): zoo.load_ldm4(path, cfg, use_ema=True)
    part = {k: v for k, v in (state | ema_of(state)).items() if k != 'model_ema.diffusion_modelout2weight'}
    with pytest.raises(ValueError, match='out.2.weight'): zoo.load_ldm4(lightning(tmp_path/'part.ckpt', part), cfg)


def test_half_precision_flat_and_old_format(pair, tmp_path):
    cfg, model, _, pipe = pair
    half = {k: v.half() if v.is_floating_point() and 'alphas' not in k else v for k, v in model.state_dict().items()}
    torch.save(half, tmp_path/'flat.pt')
    torch.save({'state_dict': half}, tmp_path/'old.pt', _use_new_zipfile_serialization=False)
    for name in ('flat.pt', 'old.pt'):
        got = zoo.load_ldm4(tmp_path/name, cfg, verbose=False).unet
        assert got.dtype == torch.float32 and torch.allclose(got.conv_in.weight, pipe.unet.conv_in.weight, atol=1e-2)


class ModelCheckpoint:
    "Lightning keeps this callback's class as a dictionary key in its files."
ModelCheckpoint.__module__, ModelCheckpoint.__qualname__ = 'pytorch_lightning.callbacks.model_checkpoint', 'ModelCheckpoint'


def test_lightning_callback_and_numpy_state(pair, tmp_path, monkeypatch):
    "Lightning 1.4 stores the class of a callback as a key, and numpy numbers: both are read without Lightning and without running either."
    import types
    import numpy as np
    cfg, model, _, pipe = pair
    for name in ('pytorch_lightning', 'pytorch_lightning.callbacks', 'pytorch_lightning.callbacks.model_checkpoint'):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules['pytorch_lightning.callbacks.model_checkpoint'].ModelCheckpoint = ModelCheckpoint
    path = lightning(tmp_path/'callback.ckpt', model.state_dict(), callbacks={ModelCheckpoint: {'best_model_score': np.float64(.5), 'dirpath': '/x'}})
    for name in list(sys.modules):
        if name.startswith('pytorch_lightning'): monkeypatch.delitem(sys.modules, name)
    got = zoo.load_ldm4(path, cfg, verbose=False)
    assert got.unet.conv_in.weight.equal(pipe.unet.conv_in.weight)


def touch(path): Path(path).write_text('executed')


class Attack:
    def __init__(self, f, *args): self.f, self.args = f, args
    def __reduce__(self): return self.f, self.args


@pytest.mark.parametrize('name', ['eval', 'system', 'ours', 'legacy', 'build'])
def test_malicious_pickle_is_refused_and_not_executed(name, tmp_path):
    mark = tmp_path/'executed'
    attack = {'eval': Attack(eval, f"open({str(mark)!r}, 'w').write('x')"), 'system': Attack(os.system, f'touch {mark}'),
              'ours': Attack(touch, str(mark)), 'legacy': Attack(touch, str(mark)), 'build': Attack(pickle.loads, pickle.dumps(Attack(touch, str(mark))))}[name]
    path = tmp_path/'bad.ckpt'
    torch.save({'state_dict': {'w': torch.zeros(3)}, 'callbacks': attack}, path, _use_new_zipfile_serialization=name != 'legacy')
    with pytest.raises(ValueError, match='refused, nothing in it was executed'): zoo.load_ldm4(path, SMALL)
    assert not mark.exists()


@pytest.mark.parametrize('keep', [.99, .5, .001])
def test_truncated(pair, keep, tmp_path):
    cfg, _, path, _ = pair
    data = path.read_bytes()
    (tmp_path/'cut.ckpt').write_bytes(data[:int(len(data)*keep)])
    with pytest.raises(ValueError, match=r'cut\.ckpt is truncated'): zoo.load_ldm4(tmp_path/'cut.ckpt', cfg)


def test_not_a_checkpoint(tmp_path):
    cases = {'text.ckpt': b'<html>404 not found</html>', 'empty.ckpt': b''}
    for name, data in cases.items():
        (tmp_path/name).write_bytes(data)
        with pytest.raises(ValueError, match=name): zoo.load_ldm4(tmp_path/name, SMALL)
    with zipfile.ZipFile(tmp_path/'zip.ckpt', 'w') as z: z.writestr('readme.txt', 'hello')
    with pytest.raises(ValueError, match='zip.ckpt'): zoo.load_ldm4(tmp_path/'zip.ckpt', SMALL)
    torch.save([torch.zeros(2)], tmp_path/'list.ckpt')
    with pytest.raises(ValueError, match='holds list'): zoo.load_ldm4(tmp_path/'list.ckpt', SMALL)
    with pytest.raises(FileNotFoundError, match='nowhere.ckpt'): zoo.load_ldm4(tmp_path/'nowhere.ckpt', SMALL)


def test_other_model_names_ten_differences(pair, tmp_path):
    cfg, model, path, _ = pair
    with pytest.raises(ValueError, match='not the model described') as e: zoo.load_ldm4(path)
    assert str(e.value).split('The first ten: ')[1].count(';') == 9
    state = model.state_dict()
    state['model.diffusion_model.label_emb.weight'] = torch.zeros(2)
    with pytest.raises(ValueError, match='unexpected model.diffusion_model.label_emb.weight'): zoo.load_ldm4(lightning(tmp_path/'a.ckpt', state), cfg)
    del state['model.diffusion_model.label_emb.weight'], state['first_stage_model.quantize.embedding.weight']
    with pytest.raises(ValueError, match='missing first_stage_model.quantize.embedding.weight'): zoo.load_ldm4(lightning(tmp_path/'b.ckpt', state), cfg)


def test_wrong_schedule_and_damaged_weights(pair, tmp_path):
    cfg, model, path, _ = pair
    with pytest.raises(ValueError, match='betas differs'): zoo.load_ldm4(path, replace(cfg, linear_end=.012))
    state = model.state_dict()
    state['model.diffusion_model.out.2.bias'] = torch.full((3,), float('nan'))
    with pytest.raises(ValueError, match='out.2.bias has values that are not finite'): zoo.load_ldm4(lightning(tmp_path/'nan.ckpt', state), cfg)


def test_labels_out_of_range(pair):
    cfg, *_, pipe = pair
    for bad in (-1, cfg.n_classes - 1, [0, 999]):
        with pytest.raises(ValueError, match='out of range'): pipe(bad)
    with pytest.raises(TypeError, match='integers'): pipe([.5])


@pytest.mark.parametrize('config, message', [(dict(width=3), 'unknown field'), (dict(channel_mult=(2, 4)), 'first factor of 1'), (5, 'expected LDMConfig'),
    (dict(num_heads=2, num_head_channels=8), 'exactly one'), (dict(model={}), 'not the YAML'), ('nowhere.yaml', 'cannot be read')])
def test_bad_config(config, message):
    with pytest.raises((ValueError, TypeError), match=message): ldm.ldm_config(config)


@pytest.mark.slow
def test_full_size(tmp_path):
    "The full LDM-4, random, 1.8 GB: read within two copies of itself in memory."
    shapes = read_keys(DATA/'ldm4_keys.csv')
    schedule = dict(LatentDiffusion(SMALL).named_buffers())
    state = {k: schedule[k] if k in schedule else torch.full(shape, .01) for k, shape in shapes.items()}
    lightning(tmp_path/'model.ckpt', state)
    del state
    pipe = zoo.load_ldm4(tmp_path/'model.ckpt')
    assert sum(p.numel() for p in pipe.unet.parameters()) == 400_920_579
