"Forms of input that users have met: each once ended in an error from below, or passed in silence."
import aquatic_nb # noqa: F401  first: torchvision may lack its operators
from collections import namedtuple

import numpy as np
import pytest
import torch
from PIL import Image
from diffusers import ControlNetModel

from aquatic_nb.core import digest
from aquatic_nb.encode import _roots
from aquatic_nb.layers import packed_layers
from aquatic_nb.metrics import image_batches
from aquatic_nb.quant import quantize
from aquatic_nb.walk import nested, record_inputs
from packed_models import conditional

QUICK = dict(laq=False, beam=1, sweeps=1, progress=False)

def test_a_batch_of_one_without_a_stride_has_a_digest():
    assert digest(torch.tensor(3).expand(1)) == digest(torch.tensor([3]))
    assert digest(torch.arange(3.).expand(1, 3)) == digest(torch.arange(3.)[None])

def test_named_tuples_stay_named():
    Pair = namedtuple('Pair', 'left right')
    assert nested(lambda t, name: t + 1, Pair(torch.zeros(2), None)).left.tolist() == [1, 1]

def test_a_single_timestep_does_not_end_the_run():
    "One-step models: the time embedding sees one input, whose centred moments are rounding noise."
    g = torch.Generator().manual_seed(0)
    calls = [dict(sample=torch.randn(4, 3, 8, 8, generator=g), timestep=999, encoder_hidden_states=torch.randn(4, 3, 8, generator=g)) for _ in range(4)]
    for bits in (5.5, 6.5): assert packed_layers(quantize(conditional(), bits, calibration=calls, **QUICK))

def test_roots_of_blocks_that_rounding_made_indefinite():
    g = torch.Generator().manual_seed(0)
    a = torch.randn(5, 4, 4, generator=g); good = a @ a.mT + torch.eye(4)
    assert torch.allclose(_roots(good) @ _roots(good).mT, good, atol=1e-4)
    bad = good.clone(); bad[2] = -1e-7*torch.eye(4)
    assert _roots(bad).isfinite().all()

def test_a_controlnet_can_be_recorded():
    net = ControlNetModel(in_channels=4, block_out_channels=(8, 16), down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D'), cross_attention_dim=8,
                          attention_head_dim=2, norm_num_groups=4, layers_per_block=1, conditioning_embedding_out_channels=(4, 8)).eval()
    call = lambda: net(torch.randn(2, 4, 8, 8), 5, torch.randn(2, 3, 8), torch.randn(2, 3, 16, 16))
    calls = record_inputs(net, call)
    assert len(calls) == 1 and torch.is_tensor(calls[0].out)
    assert packed_layers(quantize(net, 7, calibration=record_inputs(net, call), **QUICK))

def test_adapters_are_refused_before_any_work():
    peft = pytest.importorskip('peft')
    model = conditional()
    model.add_adapter(peft.LoraConfig(r=2, target_modules=['to_q'], init_lora_weights='gaussian'))
    before = {n: type(m) for n, m in model.named_modules()}
    with pytest.raises(ValueError, match='unload_lora'): quantize(model, 7, calibration=None, **QUICK)
    assert before == {n: type(m) for n, m in model.named_modules()}

def test_grey_pictures_of_16_bits_keep_their_grey(tmp_path):
    x = (np.arange(64, dtype=np.uint16)*1000).reshape(8, 8)
    Image.fromarray(x).save(tmp_path/'a.png')
    found = next(iter(image_batches(tmp_path, 1)))
    assert np.array_equal(np.asarray(found).reshape(8, 8), x >> 8)
    with pytest.raises(ValueError, match='mode F'): list(image_batches([Image.fromarray(x.astype(np.float32))], 1))
