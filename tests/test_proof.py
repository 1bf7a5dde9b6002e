"The models of the tables and their command: training goes on where it stopped, both kinds are packed, saved and loaded, rows are kept."
from dataclasses import replace

import pytest
import torch

from aquatic_nb import proof # before diffusers, which wants torchvision's operators
from aquatic_nb.cli import main
from aquatic_nb.core import generator
from aquatic_nb.hub import load_quantized
from aquatic_nb.layers import packed_layers
from aquatic_nb.models import small
from aquatic_nb.quant import quantize
from aquatic_nb.tune.distill import TuneConfig, pipeline_walks
from aquatic_nb.walk import classes_of, record
from packed_models import fill
from test_architectures import kl
from diffusers import DiTPipeline # noqa: E402

QUICK = dict(laq=False, sweeps=1, beam=2, n_calibration=2, progress=False)


def tiny_dit(): return small.dit_pipeline(fill(small.make_small_dit(1, 1, 4)), kl(1))
def tiny_flow(): return small.flow_pipeline(fill(small.make_small_flow((24,), 8)))

MAKE = dict(dit=(lambda: small.make_small_dit(1, 1, 4), small.dit_loss, (4, 4, 4)), flow=(lambda: small.make_small_flow((24,), 8), small.flow_loss, (1, 8, 8)))
PIPES = dict(dit=(tiny_dit, 'transformer', ('pos_embed.proj', 'proj_out_2')), flow=(tiny_flow, 'unet', ('conv_in', 'conv_out')))


def pipeline(name):
    make, part, _ = PIPES[name]
    pipe = make()
    pipe.set_progress_bar_config(disable=True)
    return pipe, part


class Killed(Exception): pass


@pytest.mark.parametrize('name', MAKE)
def test_a_killed_training_ends_the_same(name, tmp_path):
    make, loss, shape = MAKE[name]
    x, y = torch.randn(16, *shape, generator=generator(0, 'x')), torch.arange(16) % 10
    asked = []
    def dying(net, *args):
        asked.append(1)
        if len(asked) > 3: raise Killed
        return loss(net, *args)
    kw = dict(data=(x, y), steps=5, batch=4, lr=1e-2, save_every=2, every=1)
    whole, log = small.train_small(make, loss, **kw)
    with pytest.raises(Killed): small.train_small(make, dying, path=tmp_path/'net.pt', **kw)
    again, log2 = small.train_small(make, loss, path=tmp_path/'net.pt', **kw)
    assert all(p.equal(q) for p, q in zip(whole.state_dict().values(), again.state_dict().values()))
    assert [o['loss'] for o in log] == [o['loss'] for o in log2] and not whole.training


@pytest.mark.parametrize('name', PIPES)
def test_packed_saved_loaded_and_drawn(name, tmp_path):
    from aquatic_nb.eval.samples import sample_images
    pipe, part = pipeline(name)
    draw = lambda: sample_images(pipe, 2, steps=2, guidance_scale=2.)
    before = draw()
    quantize(getattr(pipe, part), 6, calibration=pipe, **QUICK)
    packed = draw()
    assert packed.shape == before.shape and not packed.equal(before)
    getattr(pipe, part).save_pretrained(tmp_path/'packed')
    setattr(pipe, part, load_quantized(tmp_path/'packed'))
    assert set(PIPES[name][2]) <= set(packed_layers(getattr(pipe, part))) and draw().equal(packed)


def test_every_label_is_a_class_that_was_trained():
    net = small.make_small_dit(2, 1, 4)
    small.repeat_labels(net)
    for b in net.transformer_blocks:
        t = small._label_table(b)
        assert t.shape[0] == 1001 and all(t[k].equal(t[k % 10]) for k in (10, 99, 617, 999)) and not t[1000].equal(t[0])


def test_training_leaves_withheld_classes_to_the_loss():
    "In training mode diffusers withholds classes, in each block by another coin."
    net = small.train_small(MAKE['dit'][0], small.dit_loss, (torch.randn(4, 4, 4, 4), torch.arange(4)), 1, 4, 1e-3)[0]
    assert not net.training


def test_a_pipeline_with_classes_is_shown_all_of_them():
    pipe, _ = pipeline('dit')
    calls = record(pipe, pipe.transformer, 12, 2, guidance_scale=1.5)
    labels = {int(o) for c in calls for o in c['class_labels']} - {1000}
    assert len(labels) == 12 and max(labels) > 100                  # four at a time, they were 0 to 3 each time
    assert all(c.guidance_scale.eq(1.5).all() for c in calls)       # it was 4, whatever the pipeline was called with
    n = calls[0].samples
    assert (calls[0]['class_labels'][:n] == 1000).all() and (calls[0]['class_labels'][n:] < 1000).all()
    assert record(pipe, pipe.transformer, 2, 2, guidance_scale=1.)[0].guidance_scale is None
    assert classes_of(pipe.transformer) == 1000 and classes_of(torch.nn.Linear(1, 1)) is None


def test_walks_for_tuning_draw_guidance_with_classes_too():
    pipe, _ = pipeline('dit')
    make = pipeline_walks(pipe, pipe.transformer, 2, 4, (1.5, 3.))
    seen = [float(make(i, generator(0, 'walk', i))[0].guidance_scale[0]) for i in range(3)]
    assert len(set(seen)) == 3 and all(1.5 <= g <= 3. for g in seen)


@pytest.fixture(scope='module')
def kept(tmp_path_factory): return tmp_path_factory.mktemp('work')      # what rows share, and tests too


@pytest.fixture
def tiny(monkeypatch, kept):
    "Two models of the table, tiny, that anything may be measured of in no time."
    models = {k: proof.TableModel(make, part, ends, guidance=2. if k == 'dit' else None, score='mean', judge=lambda x: float(x.mean()))
              for k, (make, part, ends) in PIPES.items()}
    monkeypatch.setattr(proof, 'MODELS', models)
    two = TuneConfig(steps=2, batch=2)
    monkeypatch.setattr(proof, 'TuneConfig', lambda minutes: two)
    monkeypatch.setattr(proof, 'replace', lambda config, steps, minutes, lr: replace(config, steps=2, batch=2, lr=lr))
    return dict(protocol=proof.TableProtocol(images=2, steps=2, beam=2, sweeps=1, n_calibration=4), folder=kept, progress=False)


def note_of(table, model, row): return table.note[(table.model == model) & (table.row == row)].item()


def test_rows_are_made_once_and_all_stand_in_the_table(tiny, tmp_path):
    table = proof.run_models(tmp_path, ['full precision', 'flow: GPTQ 4 bit', 'dit: W2A8'], **tiny)
    assert len(table) == 2*len(proof.ROWS)
    done = table[table.note == '']
    assert set(zip(done.model, done.row)) == {('dit', 'full precision'), ('flow', 'full precision'), ('flow', 'GPTQ 4 bit'), ('dit', 'W2A8')}
    assert (table.note[~table.index.isin(done.index)] == 'not measured').all()
    full, ours = (done[done.row == r] for r in ('full precision', 'W2A8'))
    assert (full.bits == 16).all() and (full.psnr_mean == 100).all()
    assert (ours.bits <= 2).all() and (ours.psnr_mean < 100).all() and (done.images == 2).all()
    lines = (tmp_path/'models.csv').read_text(encoding='utf-8').splitlines()
    assert [o.split(':')[0] for o in lines[:4]] == ['# command', '# commit', '# date', '# machine'] and str(tiny['protocol']) in lines[0]
    again = proof.run_models(tmp_path, ['dit: W2A8'], **tiny)           # they stay; nothing is made anew
    assert (tmp_path/'models.csv').read_text(encoding='utf-8').splitlines() == lines and len(again) == len(table)
    with pytest.raises(ValueError, match='another protocol'): proof.run_models(tmp_path, [], **{**tiny, 'protocol': proof.TableProtocol()})


def test_tuned_rows_and_the_peer_that_is_trained(tiny, tmp_path):
    names = ['W2 tuned', 'straight-through 2 bit', 'one setting']
    table = proof.run_models(tmp_path, [f'dit: {o}' for o in names], **tiny)
    found = table[table.row.isin(names) & (table.model == 'dit')].set_index('row')
    assert (found.note == '').all(), found.note.to_dict()
    assert found.bits['W2 tuned'] <= 2 < found.bits['straight-through 2 bit'] and (found.steps.dropna() == 2).all()


def test_a_row_that_was_not_tuned_says_so(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(proof.TableWork, 'tune', lambda work, model, config: 0)
    assert 'too little time' in note_of(proof.run_models(tmp_path, ['dit: W2 tuned'], **tiny), 'dit', 'W2 tuned')


def test_a_row_that_fails_says_why_and_is_tried_again(tiny, tmp_path, monkeypatch):
    def broken(work, row): raise RuntimeError('the peer fell over\nand more')
    with monkeypatch.context() as m:
        m.setattr(proof, '_peer_of', broken)
        table = proof.run_models(tmp_path, ['dit: GPTQ 2 bit'], **tiny)
    assert note_of(table, 'dit', 'GPTQ 2 bit') == 'failed: RuntimeError: the peer fell over'
    assert note_of(proof.run_models(tmp_path, ['dit: GPTQ 2 bit'], **tiny), 'dit', 'GPTQ 2 bit') == ''


def test_the_plan_quantizes_and_writes_nothing(tiny, tmp_path):
    table = proof.plan_models(tmp_path, ['W2', 'full precision'], tiny['protocol'])
    assert (table.state == 'to do').all() and (table.minutes >= 0).all() and len(table) == 4
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('args, message', [
    (['--peers', '--models'], 'ask for one'), (['--plan'], '--plan belongs to --models'), (['--models', 'folder'], 'leave out'),
    (['--models', '--only', 'W7'], "'W7' is no model"), (['--models', '--minutes', '0'], 'minutes'), (['--models', '-n', '1'], '-n')])
def test_bad_input_of_the_command(args, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as e: main(['bench', *args, '--out', str(tmp_path/'out')])
    assert e.value.code not in (0, None) and message in ' '.join(capsys.readouterr().err.split())
    assert not (tmp_path/'out').exists()


def test_models_that_are_not_there_are_named(monkeypatch):
    monkeypatch.setattr(small, 'files', lambda name: '/nowhere/aquatic_nb')
    with pytest.raises(FileNotFoundError, match='not in the wheel.*42_small'): small.load_small('dit')
    with pytest.raises(ValueError, match="'sd', expected one of"): small.load_small('sd')


def test_kept_models_are_small_and_plain():
    for name in small.RECIPES:
        files = list(small.small_path(name).iterdir())
        assert sum(f.stat().st_size for f in files) <= 8e6 and {f.suffix for f in files} <= {'.json', '.safetensors', '.md'}
        pipe = small.load_small(name)
        assert isinstance(pipe, DiTPipeline) == (name == 'dit')
