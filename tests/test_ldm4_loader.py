"""`load_ldm4` against an independent reimplementation of the original network (tests/ldm_original.py)."""
import os
import pickle
import sys
import warnings
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
    return request.param, model, path, zoo.load_ldm4(path, request.param, progress=False)


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


@pytest.mark.parametrize('steps, times', [(5, [801, 601, 401, 201, 1]), (7, [995, 853, 711, 569, 427, 285, 143, 1])])
def test_sampling_parity(pair, steps, times):
    "The whole walk, guided, against a DDIM written from the formula; before decoding, as quantization of latents is not continuous."
    cfg, model, _, pipe = pair
    pipe.set_progress_bar_config(disable=True)
    labels, x = torch.tensor([1, 5]), noise(cfg, seed=1)
    seen = []
    pipe(labels, steps, 3., latents=x, output_type='latent', original_timesteps=True, callback_on_step_end=lambda p, i, t, kw: seen.append((int(t), kw['latents'])))
    assert [t for t, _ in seen] == times # 7 does not divide 1,000: the original takes 8
    model.first_stage_model.decode, decode = lambda z: z*cfg.scale_factor, model.first_stage_model.decode
    theirs = model.sample(x, labels, steps, 3.)
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
    other = zoo.load_ldm4(path, file, progress=False)
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
    assert zoo.load_ldm4(tmp_path/'empty', dtype=torch.float16, progress=False).unet.dtype == torch.float16
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
        assert zoo.load_ldm4(with_ema, cfg, use_ema=use, progress=False).unet.conv_in.weight.equal(weight*factor)
    with pytest.raises(ValueError, match='use_ema=False'): zoo.load_ldm4(path, cfg, use_ema=True)
    part = {k: v for k, v in (state | ema_of(state)).items() if k != 'model_ema.diffusion_modelout2weight'}
    with pytest.raises(ValueError, match='out.2.weight'): zoo.load_ldm4(lightning(tmp_path/'part.ckpt', part), cfg)


def test_nothing_but_averaged_weights(pair, tmp_path):
    cfg, model, _, pipe = pair
    state = model.state_dict()
    only = {k: v for k, v in (state | ema_of(state)).items() if not k.startswith('model.')}
    path = lightning(tmp_path/'only.ckpt', only)
    for use in (None, True): assert zoo.load_ldm4(path, cfg, use, progress=False).unet.conv_in.weight.equal(2*pipe.unet.conv_in.weight)
    with pytest.raises(ValueError, match='averaged weights only'): zoo.load_ldm4(path, cfg, use_ema=False)
    del only['model_ema.diffusion_modelout2weight']
    with pytest.raises(ValueError, match='missing model.diffusion_model.out.2.weight'): zoo.load_ldm4(lightning(tmp_path/'part.ckpt', only), cfg)


def other_model(state, kind):
    "What the original's other files look like: KL or a wider VQ first stage, no class table."
    out = dict(state)
    if kind == 'kl': del out['first_stage_model.quantize.embedding.weight']
    if kind == 'vq': out['first_stage_model.quantize.embedding.weight'] = torch.zeros(256, 3)
    if kind == 'deeper': out['first_stage_model.encoder.down.5.block.0.conv1.weight'] = torch.zeros(3)
    if kind == 'unconditional': del out['cond_stage_model.embedding.weight']
    if kind == 'wide': out['model.diffusion_model.input_blocks.0.0.weight'] = torch.zeros(224, 3, 3, 3)
    return out


@pytest.mark.parametrize('kind, says', [('kl', 'first stage: KL'), ('vq', 'first stage: VQ with 256 codewords'), ('deeper', 'factor'), ('wide', 'U-Net: 224 wide'),
                                        ('unconditional', 'condition: none, described a table of')])
@pytest.mark.parametrize('use_ema', [None, True, False])
def test_another_kind_of_model_with_averaged_weights_is_told_its_kind(pair, tmp_path, kind, says, use_ema):
    cfg, model, *_ = pair
    state = other_model(model.state_dict(), kind)
    average = {k: v for k, v in ema_of(state).items() if 'out2weight' not in k} # of another model: names differ
    path = lightning(tmp_path/'other.ckpt', state | average)
    with pytest.raises(ValueError, match='not the model described') as e: zoo.load_ldm4(path, cfg, use_ema)
    assert says in str(e.value) and 'use_ema' not in str(e.value)


def test_averages_of_the_first_stage_are_left_alone(pair, tmp_path):
    cfg, model, _, pipe = pair
    state = model.state_dict() | {'first_stage_model.model_ema.decay': torch.tensor(.5), 'first_stage_model.model_ema.decoderconv_inweight': torch.zeros(3)}
    assert zoo.load_ldm4(lightning(tmp_path/'a.ckpt', state), cfg, progress=False).unet.conv_in.weight.equal(pipe.unet.conv_in.weight)


@pytest.mark.parametrize('n', [1, 64])
def test_flipped_bits_are_seen(pair, tmp_path, n):
    cfg, _, path, _ = pair
    data = bytearray(path.read_bytes())
    for i in torch.randint(len(data)//4, len(data)//2, (n,), generator=generator(0, 'flips')).tolist(): data[i] ^= 16
    (tmp_path/'flipped.ckpt').write_bytes(data)
    with pytest.raises(ValueError, match='flipped.ckpt is damaged'): zoo.load_ldm4(tmp_path/'flipped.ckpt', cfg)


def test_a_flip_anywhere_is_seen_or_does_nothing(tmp_path):
    "In a tensor, a header, the pickle, the directory: never other numbers, never an error that does not name the file."
    state = {f'w{i}': torch.randn(40, generator=generator(0, i)) for i in range(5)}
    data = lightning(tmp_path/'a.ckpt', state).read_bytes()
    for i in torch.randint(len(data), (150,), generator=generator(0, 'anywhere')).tolist():
        flipped = bytearray(data)
        flipped[i] ^= 1 << i % 8
        (tmp_path/'a.ckpt').write_bytes(flipped)
        try: got = ldm.read_checkpoint(tmp_path/'a.ckpt')
        except ValueError as e: assert 'a.ckpt' in str(e), (i, e)
        else: assert got.keys() == state.keys() and all(got[k].equal(state[k]) for k in state), i


def test_a_file_without_checksums_is_read_with_a_warning(pair, tmp_path):
    cfg, model, _, pipe = pair
    torch.serialization.set_crc32_options(False)
    try: path = lightning(tmp_path/'a.ckpt', model.state_dict())
    finally: torch.serialization.set_crc32_options(True)
    with pytest.warns(UserWarning, match='without checksums'): got = zoo.load_ldm4(path, cfg, progress=False)
    assert got.unet.conv_in.weight.equal(pipe.unet.conv_in.weight)


def test_another_size_than_the_published_is_remarked(tmp_path, monkeypatch, capsys):
    "By the default description only; the sha256 is printed in any case."
    monkeypatch.setattr(zoo, 'ldm_pipeline', lambda state, config, *args: ldm.ldm_pipeline(state, config or SMALL, *args))
    path = lightning(tmp_path/'model.ckpt', original(SMALL).state_dict())
    with pytest.warns(UserWarning, match='the published cin256-v2 has 1,827,378,153'): zoo.load_ldm4(path)
    assert sha256_of(path) in capsys.readouterr().out
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        zoo.load_ldm4(path, SMALL)
        monkeypatch.setattr(zoo, '_PUBLISHED_BYTES', path.stat().st_size)
        zoo.load_ldm4(path)


def stand_in(monkeypatch, full_name, base=dict):
    "A class that pickles under another name, as long as the test runs."
    import types
    module, name = full_name.rsplit('.', 1)
    made = type(name, (base,), {'__module__': module})
    parts = module.split('.')
    for n in range(1, len(parts) + 1):
        if '.'.join(parts[:n]) not in sys.modules: monkeypatch.setitem(sys.modules, '.'.join(parts[:n]), types.ModuleType('.'.join(parts[:n])))
    monkeypatch.setattr(sys.modules[module], name, made, raising=False)
    return made


def test_settings_of_lightning_and_omegaconf_are_passed_over(pair, tmp_path, monkeypatch):
    from collections import defaultdict
    from typing import Any
    cfg, model, _, pipe = pair
    with monkeypatch.context() as patch:
        made = {n: stand_in(patch, f'omegaconf.{n}', object) for n in ('dictconfig.DictConfig', 'listconfig.ListConfig', 'base.ContainerMetadata', 'nodes.AnyNode')}
        config, items, meta, node = (o() for o in made.values())
        meta.__dict__ = dict(ref_type=Any, object_type=dict, key_type=list, resolver_cache=defaultdict(dict, a={'x': 1}))
        node.__dict__, items.__dict__ = dict(_val=3, _metadata=meta), dict(_content=[node, node], _metadata=meta)
        config.__dict__ = dict(_content={'lr': node, 'list': items}, _metadata=meta, _parent=None)
        settings = stand_in(patch, 'pytorch_lightning.utilities.parsing.AttributeDict')(lr=.1, config=config, nested={'a': [1]})
        path = lightning(tmp_path/'a.ckpt', model.state_dict(), hyper_parameters=settings)
    assert not [o for o in sys.modules if o.startswith(('omegaconf', 'pytorch_lightning'))]
    assert zoo.load_ldm4(path, cfg, progress=False).unet.conv_in.weight.equal(pipe.unet.conv_in.weight)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_flat_and_old_format(pair, tmp_path, dtype):
    "A copy of another precision, schedule included, in either of torch's formats."
    cfg, model, _, pipe = pair
    half = {k: v.to(dtype) if v.is_floating_point() else v for k, v in model.state_dict().items()}
    assert half['alphas_cumprod'].dtype == dtype
    torch.save(half, tmp_path/'flat.pt')
    torch.save({'state_dict': half}, tmp_path/'old.pt', _use_new_zipfile_serialization=False)
    for name in ('flat.pt', 'old.pt'):
        got = zoo.load_ldm4(tmp_path/name, cfg, progress=False).unet
        assert got.dtype == torch.float32 and torch.allclose(got.conv_in.weight, pipe.unet.conv_in.weight, rtol=torch.finfo(dtype).eps, atol=0)


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
    got = zoo.load_ldm4(path, cfg, progress=False)
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


@pytest.mark.parametrize('data, says', [(b'<!DOCTYPE html><html>404 not found</html>', 'a web page'), (b'', 'an empty file'), (b'abc', 'text'),
    (b'\0\1\2', 'something else'), (b'version https://git-lfs.github.com/spec/v1\noid sha256:1', "git's pointer"), (b'\x1f\x8b\x08', 'a gzip'),
    (b'\x80\0\0\0\0\0\0\0{"a": 1}'.replace(b'\x80', b'\x08', 1), 'a safetensors file')])
def test_what_is_no_checkpoint_is_named(tmp_path, data, says):
    (tmp_path/'file.ckpt').write_bytes(data)
    with pytest.raises(ValueError, match='file.ckpt is no checkpoint, it looks like ' + says): zoo.load_ldm4(tmp_path/'file.ckpt', SMALL)


def test_not_a_checkpoint(tmp_path):
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
    (dict(num_heads=2, num_head_channels=8), 'exactly one'),
    (dict(model=dict(params=dict(unet_config={'params': {}}, first_stage_config={'params': {}}, cond_stage_config='__is_unconditional__'))), 'not conditioned on a class'), (dict(model={}), 'not the YAML'), ('nowhere.yaml', 'cannot be read')])
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
