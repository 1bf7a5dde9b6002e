"""A packed model in the hands of diffusers: everything that a user does with a dense one."""
import aquatic_nb # noqa: F401  first: torchvision may lack its operators
import copy, errno, json, subprocess, sys, threading
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDPMPipeline, DiffusionPipeline, PipelineQuantizationConfig, UNet2DConditionModel, UNet2DModel

from aquatic_nb import format, hub
from aquatic_nb.act import act_layers, attach_act
from aquatic_nb.hub import AquaticConfig, attach, dequantize, load_quantized, save_quantized
from aquatic_nb.layers import packed_layers
from aquatic_nb.pack import quant_report
from packed_models import C, X, conditional, ddpm, pack_model, plain, run, sample

@pytest.fixture(scope='module')
def packed(): return pack_model(conditional())

@pytest.fixture(scope='module')
def saved(packed, tmp_path_factory):
    folder = tmp_path_factory.mktemp('hub')/'a model with späces'
    packed.save_pretrained(folder)
    return folder

def same_tensors(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for n in a: assert a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]), n

def test_round_trip(packed, saved):
    back = UNet2DConditionModel.from_pretrained(saved)
    assert len(packed_layers(packed)) > 20 and list(packed_layers(back)) == list(packed_layers(packed))
    assert not any(t.is_meta for t in [*back.parameters(), *back.buffers()]) and not back.training
    assert torch.equal(run(back), run(packed))
    same_tensors(back, packed)
    for n, layer in packed_layers(packed).items(): assert packed_layers(back)[n].scheme == layer.scheme, n

def test_config_entry(packed, saved):
    entry = json.loads((saved/'config.json').read_text())['quantization_config']
    pair = ['mid_block.attentions.0.transformer_blocks.0.attn1.to_q', 'mid_block.attentions.0.transformer_blocks.0.attn1.to_k']
    assert entry == {'quant_method': 'aquatic', 'format_version': 1, 'bits': 6, 'act_bits': None, 'shared_codebooks': {pair[0]: pair[1:]}}
    back = load_quantized(saved)
    assert back.get_submodule(pair[0]).codebooks is back.get_submodule(pair[1]).codebooks

def test_another_process(packed, saved, tmp_path):
    torch.save((X, C, run(packed)), tmp_path/'x.pt')
    code = '''import sys, torch, aquatic_nb
from diffusers import UNet2DConditionModel
x, c, y = torch.load(sys.argv[2])
with torch.no_grad(): print(torch.equal(UNet2DConditionModel.from_pretrained(sys.argv[1])(x, 7, c).sample, y))'''
    out = subprocess.run([sys.executable, '-c', code, str(saved), str(tmp_path/'x.pt')], capture_output=True, text=True)
    assert out.stdout.strip() == 'True', out.stderr

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_load_dtypes(packed, saved, dtype):
    back = UNet2DConditionModel.from_pretrained(saved, torch_dtype=dtype)
    assert back.dtype == dtype and run(back).dtype == dtype
    for n, layer in packed_layers(back).items():
        for k in layer._stored:
            a, b = getattr(layer, k), getattr(packed_layers(packed)[n], k)
            assert (a is None) == (b is None) and (a is None or torch.equal(a, b) and a.dtype == b.dtype), (n, k)
        assert layer.compute_dtype == dtype, n

@pytest.mark.parametrize('how', [dict(device_map='cpu'), dict(device_map='auto'), dict(device_map={'': 'cpu'}), dict(low_cpu_mem_usage=True), dict(disable_mmap=True), dict(torch_dtype=torch.float32)], ids=str)
def test_ways_of_loading(packed, saved, how):
    assert torch.equal(run(UNet2DConditionModel.from_pretrained(saved, **how)), run(packed))

def test_disk_offload_is_refused(saved, tmp_path):
    with pytest.raises(ValueError, match='disk'): UNet2DConditionModel.from_pretrained(saved, device_map={'': 'disk'}, offload_folder=tmp_path)

@pytest.mark.parametrize('how', [dict(max_shard_size='40KB'), dict(variant='int'), dict(max_shard_size='40KB', variant='int')], ids=str)
def test_shards_and_variants(packed, tmp_path, how):
    save_quantized(packed, tmp_path/'m', **how)
    files = sorted(o.name for o in (tmp_path/'m').glob('*.safetensors'))
    assert (len(files) > 1) == ('max_shard_size' in how), files
    back = UNet2DConditionModel.from_pretrained(tmp_path/'m', variant=how.get('variant'))
    same_tensors(back, packed)
    assert torch.equal(run(back), run(packed))

def test_a_config_that_nothing_can_be_built_from_is_named(packed, tmp_path):
    "Negative widths: torch's own RuntimeError does not reach the user bare."
    save_quantized(packed, tmp_path/'m')
    path = tmp_path/'m'/'config.json'
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | dict(block_out_channels=[-o for o in config['block_out_channels']])))
    with pytest.raises(ValueError, match='config.json: no UNet2DConditionModel can be built from it'): load_quantized(tmp_path/'m')


def test_the_variant_that_is_loaded_is_the_one_that_is_checked(packed, tmp_path):
    "Two variants in one folder, one of them damaged: each is judged by its own file."
    save_quantized(packed, tmp_path/'m', variant='int')
    plain, other = (tmp_path/'m'/f'diffusion_pytorch_model.{o}safetensors' for o in ('', 'int.'))
    plain.write_bytes(other.read_bytes())
    assert format.weight_files(tmp_path/'m') == [plain] and hub.weight_files(tmp_path/'m', 'int') == [other]
    other.write_bytes(other.read_bytes()[:-9])
    assert torch.equal(run(load_quantized(tmp_path/'m')), run(packed))
    with pytest.raises(ValueError, match='int.safetensors'): load_quantized(tmp_path/'m', variant='int')
    with pytest.raises(ValueError, match="of variant 'no'"): load_quantized(tmp_path/'m', variant='no')

def test_same_bytes_again(packed, saved, tmp_path):
    load_quantized(saved).save_pretrained(tmp_path/'again')
    name = 'diffusion_pytorch_model.safetensors'
    assert (tmp_path/'again'/name).read_bytes() == (saved/name).read_bytes()
    assert json.loads((tmp_path/'again'/'config.json').read_text())['quantization_config'] == json.loads((saved/'config.json').read_text())['quantization_config']

def test_size_on_disk(packed, saved):
    path = saved/'diffusion_pytorch_model.safetensors'
    header = format.read_header(path)
    layers = {id(p): p.nbytes for m in packed_layers(packed).values() for p in m.parameters()}
    rest = sum(p.nbytes for p in packed.parameters() if id(p) not in layers)
    data = path.stat().st_size - 8 - int.from_bytes(path.read_bytes()[:8], 'little')
    assert data == sum(layers.values()) + rest + 4*len(header) # one checksum a tensor, and one for the entry of config.json
    assert data == quant_report(packed).attrs['total_bytes'] + 4*len(header)
    for n, m in packed_layers(packed).items(): assert sum(b - a for k in m._stored for _, _, a, b in [header.get(f'{n}.{k}', (0, 0, 0, 0))]) <= m.aq.nbytes

def test_size_on_disk_with_activations(packed, tmp_path):
    model = copy.deepcopy(packed)
    batches = [dict(sample=X, timestep=torch.tensor(t), encoder_hidden_states=C) for t in (1, 500)]
    hub.attach(attach_act(model, 8, batches), bits=6).save_pretrained(tmp_path)
    path = tmp_path/'diffusion_pytorch_model.safetensors'
    data = path.stat().st_size - 8 - int.from_bytes(path.read_bytes()[:8], 'little')
    assert data == quant_report(model).attrs['total_bytes'] + 4*len(format.read_header(path))

def test_pickles_are_refused(packed, tmp_path):
    with pytest.raises(ValueError, match='safe_serialization'): packed.save_pretrained(tmp_path/'p', safe_serialization=False)

def test_deepcopy_compile_and_casts(packed):
    assert torch.equal(run(copy.deepcopy(packed)), run(packed))
    assert torch.allclose(run(torch.compile(copy.deepcopy(packed), backend='eager')), run(packed), atol=1e-5)
    m = copy.deepcopy(packed).to(torch.bfloat16).half().float()
    for n, layer in packed_layers(m).items():
        for k in layer._stored: assert getattr(layer, k) is None or torch.equal(getattr(layer, k), getattr(packed_layers(packed)[n], k))

@pytest.mark.parametrize('how', [dict(offload_type='leaf_level'), dict(offload_type='block_level', num_blocks_per_group=1)], ids=str)
def test_group_offload(packed, saved, how):
    where = dict(onload_device=torch.device('cpu'), offload_device=torch.device('cpu'))
    try: conditional().enable_group_offload(**where, **how)
    except AttributeError: pytest.skip('this diffusers offloads no model at all without an accelerator')
    m = load_quantized(saved)
    m.enable_group_offload(**where, **how)
    assert torch.equal(run(m), run(packed))

def test_file_replaced_under_a_loaded_model(packed, saved, tmp_path):
    save_quantized(packed, tmp_path/'m')
    back = load_quantized(tmp_path/'m')
    save_quantized(pack_model(conditional(5)), tmp_path/'m', force=True)
    assert torch.equal(run(back), run(packed)) and not torch.equal(run(load_quantized(tmp_path/'m')), run(packed))

# pipelines

@pytest.fixture(scope='module')
def pipe(): return ddpm(pack_model(plain()))

def test_pipeline(pipe, tmp_path):
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path/'pipe')
    for cls in (DDPMPipeline, DiffusionPipeline):
        back = cls.from_pretrained(tmp_path/'pipe')
        back.set_progress_bar_config(disable=True)
        assert len(packed_layers(back.unet)) == len(packed_layers(pipe.unet)) > 20
        assert np.array_equal(sample(back), sample(pipe))
    assert np.array_equal(sample(DDPMPipeline.from_pretrained(tmp_path/'pipe', unet=back.unet)), sample(pipe))
    half = DiffusionPipeline.from_pretrained(tmp_path/'pipe', torch_dtype=torch.bfloat16)
    assert half.unet.dtype == torch.bfloat16 and run(half.unet).isfinite().all() # this pipeline cannot turn bf16 images into numpy
    back.to('cpu', torch.bfloat16)
    assert torch.equal(run(back.unet), run(half.unet))
    assert DDIMPipeline.from_pipe(back, torch_dtype=torch.float32).unet.dtype == torch.float32

def test_quantize_while_loading(tmp_path):

    plain(3).save_pretrained(tmp_path/'dense')
    m = UNet2DModel.from_pretrained(tmp_path/'dense', quantization_config=AquaticConfig(bits=6))
    assert len(packed_layers(m)) > 10 and quant_report(m).attrs['bits'] <= 6
    m.save_pretrained(tmp_path/'packed')
    assert json.loads((tmp_path/'packed'/'config.json').read_text())['quantization_config']['bits'] == 6
    assert torch.equal(run(UNet2DModel.from_pretrained(tmp_path/'packed')), run(m))
    ddpm(plain(3)).save_pretrained(tmp_path/'pipe')
    p = DiffusionPipeline.from_pretrained(tmp_path/'pipe', quantization_config=PipelineQuantizationConfig(quant_mapping={'unet': AquaticConfig(bits=6)}))
    assert torch.equal(run(p.unet), run(m))

def test_quantize_while_loading_needs_bits(tmp_path):
    plain(3).save_pretrained(tmp_path/'dense')
    with pytest.raises(ValueError, match='AquaticConfig.bits='): UNet2DModel.from_pretrained(tmp_path/'dense', quantization_config=AquaticConfig())
    with pytest.raises(ValueError, match='act_bits needs calibration'): UNet2DModel.from_pretrained(tmp_path/'dense', quantization_config=AquaticConfig(bits=6, act_bits=8))

def test_dequantize(packed, saved, tmp_path):
    dense = dequantize(load_quantized(saved))
    assert not packed_layers(dense) and torch.allclose(run(dense), run(packed), atol=1e-5)
    assert 'quantization_config' not in dense.config and getattr(dense, 'hf_quantizer', None) is None
    dense.save_pretrained(tmp_path/'dense')
    assert torch.equal(run(UNet2DConditionModel.from_pretrained(tmp_path/'dense')), run(dense))
    assert not packed_layers(load_quantized(saved).dequantize()) # diffusers' own method
    stale = dequantize(UNet2DConditionModel.from_config(packed.config))
    assert 'quantization_config' not in stale.config

def test_activations(packed, tmp_path):
    m = pack_model(conditional())
    batches = [dict(sample=X, timestep=torch.tensor(t), encoder_hidden_states=C) for t in (1, 50, 99)]
    attach(attach_act(m, 8, batches), bits=6)
    assert {a.scale.shape[1] for a in act_layers(m).values()} == {1, 2} # skip concatenations have two halves
    save_quantized(m, tmp_path/'a8')
    assert json.loads((tmp_path/'a8'/'config.json').read_text())['quantization_config']['act_bits'] == 8
    for dtype in (torch.float32, torch.bfloat16):
        back = load_quantized(tmp_path/'a8', torch_dtype=dtype)
        for n, a in act_layers(back).items():
            b = act_layers(m)[n]
            assert torch.equal(a.scale, b.scale) and torch.equal(a.zero, b.zero) and a.split == b.split and a.bits == b.bits, n
        if dtype == torch.float32:
            for t in (1, 30, 99): assert torch.equal(run(back, t), run(m, t))
    assert not torch.equal(run(m), run(packed))

def test_two_threads(pipe):
    pipe.set_progress_bar_config(disable=True)
    alone = [sample(pipe, seed) for seed in (1, 2)]
    got = [None, None]
    def work(i):
        own = DDPMPipeline(pipe.unet, type(pipe.scheduler).from_config(pipe.scheduler.config)) # one model, a scheduler each
        own.set_progress_bar_config(disable=True)
        for _ in range(3): got[i] = sample(own, i + 1)
    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for t in threads: t.start()
    for t in threads: t.join()
    for a, b in zip(alone, got): assert np.array_equal(a, b)

# LoRA

@pytest.fixture(scope='module')
def peft(): return pytest.importorskip('peft') # in the development set

def wake(model):
    "Adapters begin at zero; these do something."
    with torch.no_grad():
        for n, p in model.named_parameters():
            if 'lora_B' in n: p.add_(.1)

def test_lora(packed, peft):
    m = copy.deepcopy(packed)
    m.add_adapter(peft.LoraConfig(r=2, target_modules=['to_q', 'to_v', 'ff.net.2'], init_lora_weights='gaussian'))
    assert torch.equal(run(m), run(packed))
    trainable = [n for n, p in m.named_parameters() if p.requires_grad]
    assert trainable and all('lora_' in n for n in trainable)
    m(X, 7, C).sample.square().mean().backward()
    grads = [p.grad for n, p in m.named_parameters() if 'lora_B' in n]
    assert all(g is not None for g in grads) and any(g.abs().sum() > 0 for g in grads)
    wake(m)
    assert not torch.equal(run(m), run(packed))
    with pytest.raises(ValueError, match='cannot take in an adapter.*dequantize'): m.fuse_lora()
    m.delete_adapters('default')
    with pytest.raises(ValueError, match='packed convolution.*merge it into the dense model'): m.add_adapter(peft.LoraConfig(r=2, target_modules=['conv1']), 'other')
    assert torch.equal(run(m), run(packed))

@pytest.mark.parametrize('kind', ['LoraConfig', 'LoHaConfig', 'LoKrConfig', 'IA3Config', 'OFTConfig'])
def test_no_adapter_is_lost_in_merging(packed, peft, kind):
    "Whatever peft calls it: what is added to a decoded weight is gone at the next call."
    names = ['to_q', 'ff.net.2']
    more = dict(feedforward_modules=names[1:]) if kind == 'IA3Config' else {}
    model = peft.inject_adapter_in_model(getattr(peft, kind)(target_modules=names, **more), copy.deepcopy(packed))
    worn = [m for m in model.modules() if hasattr(m, 'merge') and hasattr(m, 'base_layer')]
    assert len(worn) > 5 and torch.allclose(run(model), run(packed), atol=1e-4)
    for m in worn:
        with pytest.raises(ValueError, match='cannot take in an adapter.*dequantize'): m.merge()

def test_lora_is_loaded_saved_and_merged(packed, peft, tmp_path):
    dense = conditional()
    dense.add_adapter(peft.LoraConfig(r=2, target_modules=['to_q', 'to_out.0'], init_lora_weights='gaussian'))
    wake(dense)
    dense.save_lora_adapter(tmp_path/'lora') # trained on the dense model
    m = copy.deepcopy(packed)
    m.load_lora_adapter(tmp_path/'lora', prefix=None, use_safetensors=True)
    worn = run(m)
    assert not torch.equal(worn, run(packed))
    with pytest.raises(ValueError, match='wears an adapter.*save_lora_adapter.*unload_lora'): m.save_pretrained(tmp_path/'m')
    m.save_lora_adapter(tmp_path/'again', adapter_name=next(iter(m.peft_config)))
    back = copy.deepcopy(packed)
    back.load_lora_adapter(tmp_path/'again', prefix=None, use_safetensors=True)
    assert torch.equal(run(back), worn)
    dequantize(m) # then it is an adapter as any other
    m.fuse_lora(); m.unload_lora()
    assert torch.allclose(run(m), worn, atol=1e-4) and not any('lora' in n or 'base_layer' in n for n in m.state_dict())

# what can go wrong while saving

def test_save_refuses_an_existing_folder(packed, tmp_path):
    save_quantized(packed, tmp_path/'m')
    with pytest.raises(FileExistsError, match='force=True'): save_quantized(packed, tmp_path/'m')
    (tmp_path/'thesis.txt').write_text('mine')
    with pytest.raises(FileExistsError, match='no model folder'): save_quantized(packed, tmp_path, force=True)
    assert (tmp_path/'thesis.txt').exists()

def test_full_disk(packed, tmp_path, monkeypatch):
    save_quantized(packed, tmp_path/'m')
    before = {o.name: o.read_bytes() for o in (tmp_path/'m').iterdir()}
    def full(folder, **kw):
        Path(folder).mkdir(); (Path(folder)/'config.json').write_text('{')
        raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(packed, 'save_pretrained', full, raising=False)
    with pytest.raises(OSError, match='free some space') as e: save_quantized(packed, tmp_path/'m', force=True)
    assert str(tmp_path/'m') in str(e.value) and e.value.errno == errno.ENOSPC
    assert {o.name: o.read_bytes() for o in (tmp_path/'m').iterdir()} == before and [o.name for o in tmp_path.iterdir()] == ['m']

def test_unwritable_destination(packed, tmp_path):
    (tmp_path/'file').write_text('')
    with pytest.raises(OSError, match='cannot write'): save_quantized(packed, tmp_path/'file'/'m')
