"What may be named as a source: variants, one file of Stable Diffusion's layout, prompts; and what a person is told when it is something else."
import aquatic_nb # noqa: F401  first: torchvision may lack its operators
import json
import re
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel, UNet2DModel
from safetensors.torch import load_file, save_file

from aquatic_nb import cli, ldm4, sources
from aquatic_nb.calib import own_scheduler
from aquatic_nb.hub import load_quantized
from packed_models import ddpm, fill

QUICK = ['--no-calibration', '--bits', '8']


def aquatic(capsys, *args):
    "Run a command in this process: exit code, stdout, stderr."
    capsys.readouterr()
    with pytest.raises(SystemExit) as e: cli.main([str(a) for a in args])
    return (e.value.code or 0, *capsys.readouterr())


def few():
    "A U-Net of some ten layers."
    return fill(UNet2DModel(sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4,
                            down_block_types=('DownBlock2D',), up_block_types=('UpBlock2D',), add_attention=False))


# variants --------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def half(tmp_path_factory):
    "A pipeline folder with nothing but the fp16 variant."
    path = tmp_path_factory.mktemp('half')/'half'
    pipe = ddpm(few().half())
    pipe.save_pretrained(path, variant='fp16')
    return path


def test_the_only_variant_is_taken(half, tmp_path, capsys):
    for src in (half, half/'unet'):
        code, out, err = aquatic(capsys, 'quantize', src, '--plan', '--json', *QUICK)
        assert code == 0, err
        plan = json.loads(out)
        code, out, err = aquatic(capsys, 'quantize', src, tmp_path/src.name, '--json', *QUICK)
        assert code == 0, err
        run = json.loads(out)
        assert plan['variant'] == run['variant'] == 'fp16'
        table = sources.aquatic_nb.quant.quant_report(load_quantized(tmp_path/src.name/('unet' if src == half else '')))
        assert {o['layer']: (o['scheme'], o['bytes']) for o in plan['layers']} == {r.layer: (r.scheme, r.bytes) for r in table.itertuples()}


def test_variants_are_chosen(half, tmp_path, capsys):
    path = shutil.copytree(half, tmp_path/'both')
    weights = path/'unet'/'diffusion_pytorch_model.fp16.safetensors'
    shutil.copy(weights, weights.with_name('diffusion_pytorch_model.bf16.safetensors'))
    code, out, err = aquatic(capsys, 'quantize', path, tmp_path/'dst', *QUICK)
    assert code == 2 and "['bf16', 'fp16']" in err and '--variant' in err and not (tmp_path/'dst').exists()
    assert aquatic(capsys, 'sample', path, '--out', tmp_path/'out')[0] == 2
    code, out, err = aquatic(capsys, 'sample', path, '--variant', 'fp16', '--out', tmp_path/'out', '--n', 1, '--steps', 1)
    assert code == 0, err
    code, out, err = aquatic(capsys, 'quantize', path, '--plan', '--variant', 'int8', *QUICK)
    assert code == 2 and '--variant int8' in err and 'fp16' in err
    few().save_pretrained(path/'unet')                       # now there are plain ones as well
    assert sources.find_source(str(path)).variant is None and sources.find_source(str(path), variant='fp16').variant == 'fp16'


# one file --------------------------------------------------------------------------------------------------------------

def original_name(name, layers, ups_attend):
    "The name that the original code has for a tensor of a diffusers U-Net with `layers` residual blocks a level."
    top = {'time_embedding.linear_1': 'time_embed.0', 'time_embedding.linear_2': 'time_embed.2', 'conv_in': 'input_blocks.0.0',
           'conv_norm_out': 'out.0', 'conv_out': 'out.2', 'add_embedding.linear_1': 'label_emb.0.0', 'add_embedding.linear_2': 'label_emb.0.2'}
    stem, leaf = name.rsplit('.', 1)
    if stem in top: return f'{top[stem]}.{leaf}'
    inside = {'norm1': 'in_layers.0', 'conv1': 'in_layers.2', 'norm2': 'out_layers.0', 'conv2': 'out_layers.3', 'time_emb_proj': 'emb_layers.1',
              'conv_shortcut': 'skip_connection'}
    place = re.match(r'(down|up|mid)_block[s.]\.?(\d+\.)?(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)', name)
    side, i, what, j, rest = place[1], int((place[2] or '0').strip('.')), place[3], int(place[4]), place[5]
    if what == 'resnets':
        part, _, leaf = rest.rpartition('.')
        rest = f'{inside[part]}.{leaf}'
    if side == 'mid': return f'middle_block.{2*j if what == "resnets" else 1}.{rest}'
    if side == 'down':
        if what == 'downsamplers': return f'input_blocks.{(layers + 1)*(i + 1)}.0.op.{rest.removeprefix("conv.")}'
        return f'input_blocks.{(layers + 1)*i + j + 1}.{int(what == "attentions")}.{rest}'
    if what == 'upsamplers': return f'output_blocks.{(layers + 1)*i + layers}.{1 + ups_attend[i]}.{rest}'
    return f'output_blocks.{(layers + 1)*i + j}.{int(what == "attentions")}.{rest}'


SHARED = dict(sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4)
SD15 = dict(SHARED, down_block_types=('CrossAttnDownBlock2D', 'DownBlock2D'), up_block_types=('UpBlock2D', 'CrossAttnUpBlock2D'), cross_attention_dim=8,
            attention_head_dim=2)
SDXL = dict(SHARED, down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D'), up_block_types=('CrossAttnUpBlock2D', 'UpBlock2D'), cross_attention_dim=8,
            attention_head_dim=(2, 4), transformer_layers_per_block=(1, 2), use_linear_projection=True, addition_embed_type='text_time',
            addition_time_embed_dim=4, projection_class_embeddings_input_dim=6*4 + 8)


@pytest.fixture(scope='module', params=['sd15', 'sdxl'])
def single(request, tmp_path_factory):
    "(a file as model sites have them, the folder that describes it, the U-Net)"
    path = tmp_path_factory.mktemp(request.param)
    unet = fill(UNet2DConditionModel(**(SD15 if request.param == 'sd15' else SDXL)))
    ups = [type(o).__name__.startswith('CrossAttn') for o in unet.up_blocks]
    state = {'model.diffusion_model.' + original_name(k, 1, ups): v.half() for k, v in unet.state_dict().items()}
    state |= {'first_stage_model.decoder.conv_in.weight': torch.zeros(2, 2), 'cond_stage_model.transformer.text_model.position_ids': torch.arange(3)}
    save_file(state, path/'model é.safetensors')
    unet.save_config(path/'described'/'unet')
    DDIMScheduler(beta_start=.002).save_config(path/'described'/'scheduler')
    with torch.no_grad():
        for p in unet.parameters(): p.copy_(p.half().float())
    return path/'model é.safetensors', path/'described', unet


def test_one_file(single, tmp_path, capsys):
    path, config, unet = single
    code, out, err = aquatic(capsys, 'quantize', path, '--config', config, '--plan', '--json', *QUICK)
    assert code == 0, err
    plan = json.loads(out)
    model, same = sources.load_source(sources.find_source(str(path), config=str(config)))
    state = model.state_dict()
    scheduler, origin = own_scheduler(model)                 # calibration walks by the one that is described
    assert scheduler.config.beta_start == .002 and 'of its folder' in origin
    assert model is same and state.keys() == unet.state_dict().keys() and all(torch.equal(state[k], v) for k, v in unet.state_dict().items())
    code, out, err = aquatic(capsys, 'quantize', path, tmp_path/'small', '--config', config/'unet', '--json', *QUICK)
    assert code == 0, err
    packed = load_quantized(tmp_path/'small')
    assert json.loads(out)['layers'] == sum(o['scheme'] != 'dense' for o in plan['layers']) and type(packed) is UNet2DConditionModel
    assert str(config) not in (tmp_path/'small'/'config.json').read_text()
    kernel = state['conv_in.weight']
    assert (packed.conv_in.weight - kernel).norm() < .1*kernel.norm()


def test_one_file_and_another_description(single, tmp_path, capsys):
    path, config, _ = single
    for args, says in ((['--config', 'sd15'], 'give another --config'), (['--config', 'sdxl'], 'give another --config'), ([], 'give --config'),
                       (['--config', tmp_path], "expected sd15 or sdxl")):
        code, out, err = aquatic(capsys, 'quantize', path, tmp_path/'dst', *args, *QUICK)
        assert code == 2 and says in err and out == '' and err.count('\n') == 1, err
    state = load_file(path)
    state.pop('model.diffusion_model.middle_block.0.in_layers.2.weight')
    save_file(state, tmp_path/'torn.safetensors')
    code, out, err = aquatic(capsys, 'quantize', tmp_path/'torn.safetensors', tmp_path/'dst', '--config', config, *QUICK)
    assert code == 2 and "'mid_block.resnets.0.conv1.weight'" in err and not (tmp_path/'dst').exists(), err


def test_files_that_are_something_else(tmp_path, capsys):
    fill(AutoencoderKL(latent_channels=4, block_out_channels=(4,), norm_num_groups=2, sample_size=4)).save_pretrained(tmp_path/'vae')
    (tmp_path/'a.ckpt').write_bytes(b'PK'), (tmp_path/'noise.safetensors').write_bytes(b'noise'*100)
    for path, says in ((tmp_path/'vae'/'diffusion_pytorch_model.safetensors', 'model.diffusion_model.'), (tmp_path/'a.ckpt', 'no .safetensors'),
                       (tmp_path/'noise.safetensors', 'noise.safetensors')):
        code, out, err = aquatic(capsys, 'quantize', path, tmp_path/'dst', '--config', 'sd15', *QUICK)
        assert code == 2 and says in err and err.count('\n') == 1, err
    code, out, err = aquatic(capsys, 'quantize', tmp_path/'vae', tmp_path/'dst', '--config', 'sd15', *QUICK)
    assert code == 2 and '--config' in err


@pytest.mark.parametrize('name, parameters', [('sd15', 859_520_964), ('sdxl', 2_567_463_684)])
def test_shipped_descriptions(name, parameters):
    "The published sizes, and a scheduler beside them."
    folder = sources.find_source.__globals__['_config_folder'](name)
    model = sources.empty_model(sources.Source(folder))
    assert sum(p.numel() for p in model.parameters()) == parameters and all(p.is_meta for p in model.parameters())
    same = ldm4.meta_model(dict(sd15='SD 1.5', sdxl='SDXL')[name])
    assert dict(same.config) == {k: v for k, v in model.config.items() if k != '_class_name'} and [o.shape for o in same.parameters()] == [o.shape for o in model.parameters()]
    found = json.loads((folder.parent/'scheduler'/'scheduler_config.json').read_text())
    assert (found['beta_schedule'], found['beta_start'], found['beta_end']) == ('scaled_linear', .00085, .012)


# prompts, settings by hand ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize('content, says', [(b'\xff\xfea\0', 'UTF-8'), ('café'.encode('latin-1'), 'byte 0xe9 at 3'), (b'', 'no prompt'),
                                           (b'\n \n', 'no prompt'), ('ab'.encode('utf-16-le'), 'UTF-8')])
def test_prompts_that_are_none(tmp_path, content, says):
    (tmp_path/'p.txt').write_bytes(content)
    with pytest.raises(ValueError, match=says): sources.read_prompts(tmp_path/'p.txt')


def test_prompts(tmp_path):
    (tmp_path/'p.txt').write_bytes('\ufeffein Haus\r\n\r\n  кот \n'.encode())
    assert sources.read_prompts(tmp_path/'p.txt') == ['ein Haus', 'кот']


def test_prompts_and_guidance_need_a_pipeline_that_takes_them(half, tmp_path, capsys):
    (tmp_path/'p.txt').write_text('a house')
    for src, args in ((half, ['--prompts', tmp_path/'p.txt']), (half/'unet', ['--guidance', 2]), (half, ['--guidance', 2])):
        code, out, err = aquatic(capsys, 'quantize', src, tmp_path/'dst', '--bits', 8, *args)
        assert code == 2 and args[0] in err and err.count('\n') == 1, err
    code, out, err = aquatic(capsys, 'quantize', half, tmp_path/'dst', '--bits', 8, '--prompts', tmp_path/'none.txt')
    assert code == 4 and 'none.txt' in err


def test_settings_by_hand(half, tmp_path, capsys):
    wide = ['--no-calibration', '--bits', '16']
    code, out, err = aquatic(capsys, 'quantize', half, tmp_path/'dst', '--override', '*conv1=dense', '--override', 'mid_block.*=4', *wide)
    assert code == 0, err
    table = sources.aquatic_nb.quant.quant_report(load_quantized(tmp_path/'dst'/'unet')).set_index('layer').scheme
    assert table['mid_block.resnets.0.conv1'] == 'uniform4' and table['down_blocks.0.resnets.0.conv1'] == 'dense'
    for text, says in (('nothing*=8', 'matches no'), ('conv_in', 'PATTERN=SETTING'), ('conv_in=9x9', 'conv_in'), ('=8', 'PATTERN=SETTING')):
        code, out, err = aquatic(capsys, 'quantize', half, '--plan', '--override', text, *QUICK)
        assert code == 2 and says in err and err.count('\n') == 1, err

@pytest.mark.parametrize('damage', ['truncated', 'empty', 'no header', 'another shape', 'a shard less'])
def test_a_plan_sees_what_is_wrong_with_the_files(damage, tmp_path):
    "A run would fail hours, or at least a load, later."
    model = few()
    model.save_pretrained(tmp_path/'m', max_shard_size='5KB' if damage == 'a shard less' else '10GB')
    sources.empty_model(sources.find_source(str(tmp_path/'m')))
    files = sorted((tmp_path/'m').glob('*.safetensors'))
    if damage == 'truncated': files[0].write_bytes(files[0].read_bytes()[:-5])
    if damage == 'empty': files[0].write_bytes(b'')
    if damage == 'no header': files[0].write_bytes(b'x'*200)
    if damage == 'a shard less': files[1].unlink()
    if damage == 'another shape':
        tensors = load_file(files[0])
        tensors['conv_in.weight'] = tensors['conv_in.weight'][:, :1].contiguous()
        save_file(tensors, files[0])
    with pytest.raises(ValueError) as e: sources.empty_model(sources.find_source(str(tmp_path/'m')))
    assert str(tmp_path) in str(e.value) and (damage != 'another shape' or "'conv_in.weight'" in str(e.value))
