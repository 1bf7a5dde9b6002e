"The second shipped model: its files, its words, its judge, and what users of Stable Diffusion do with it."
import shutil

import pytest
import torch

from aquatic_nb import zoo
from aquatic_nb.core import generator # before diffusers, which wants torchvision's operators
from aquatic_nb.eval.samples import compare, sample_images
from aquatic_nb.layers import packed_layers
from aquatic_nb.models.mini_sd import caption_of, emoji_set, make_tokenizer, place_emoji
from aquatic_nb.quant import quantize_unet
from aquatic_nb.tune.distill import TuneConfig
from diffusers import EulerDiscreteScheduler, StableDiffusionImg2ImgPipeline # noqa: E402


@pytest.fixture(scope='module')
def pipe():
    pipe = zoo.load_mini_sd()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, texts, steps=10, seed=0, guidance=4., **kw):
    streams = [generator(seed, 'test', i) for i in range(len(texts))]
    return pipe(texts, num_inference_steps=steps, guidance_scale=guidance, generator=streams, output_type='pt', **kw).images


def test_shipped_files():
    root = zoo.mini_path(model='mini_sd')
    files = [p for p in root.rglob('*') if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 30e6
    assert not [p for p in files if p.suffix in ('.pt', '.pkl', '.bin', '.ckpt')]
    assert not [p for p in files if p.suffix == '.json' and '_name_or_path": "/' in p.read_text(encoding='utf-8')] # no machine's paths
    card = (root/'model_card.md').read_text(encoding='utf-8')
    for word in ('SIL Open Font License', 'Apache-2.0', 'Recipe', 'Measured', 'retrieval', 'Limits'): assert word in card


def test_missing_files_are_named(tmp_path, monkeypatch):
    package = tmp_path/'aquatic_nb'
    keep = shutil.ignore_patterns('*.safetensors', '*.png', 'concepts.txt')
    shutil.copytree(zoo.mini_path(model='mini_sd'), package/'assets'/'mini_sd', ignore=keep)
    monkeypatch.setattr(zoo, 'files', lambda name: package)
    for load in (zoo.load_mini_sd, zoo.emoji_concepts, zoo.emoji_pictures, zoo.load_emoji_judge):
        with pytest.raises(FileNotFoundError, match='reinstall aquatic-nb'): load()


def test_concepts_are_told_apart():
    table, pictures = zoo.emoji_concepts(), zoo.emoji_pictures()
    assert len(table) == len(pictures) == 267 and table.caption.is_unique and table.character.is_unique
    every = [w for o in table.words for w in o]
    assert len(every) == len(set(every)), [w for w in every if every.count(w) > 1]
    assert set(table.group) == {'face', 'animal', 'plant', 'food', 'heart', 'vehicle', 'sky', 'thing'}
    flat = pictures.flatten(1).float()
    assert (torch.cdist(flat, flat) + 1e9*torch.eye(267)).min() > 1000   # no two pictures alike
    assert (pictures[..., 3] > 0).float().mean((1, 2)).min() > .05


@pytest.mark.parametrize('n', [1, 5, 267, 300])
def test_prompts_name_every_emoji_in_turn(n):
    texts, which = zoo.emoji_prompts(n, seed=3)
    again, _ = zoo.emoji_prompts(n, seed=3)
    captions = zoo.emoji_concepts().caption
    assert len(texts) == len(which) == n and texts == again
    assert all(f'a {captions[int(k)]} on a ' in t for t, k in zip(texts, which))
    assert len(set(which[:267].tolist())) == min(n, 267)
    assert n < 5 or texts != zoo.emoji_prompts(n, seed=4)[0]


def test_the_judge_knows_real_pictures_and_scores_count():
    images, which, _ = emoji_set(zoo.emoji_pictures(), 1, seed=99)
    found = zoo.emoji_scores(images/255, which)
    assert found['accuracy'] > .97 and found['group'] >= found['accuracy'] and found['retrieval'] >= found['accuracy']
    wrong = zoo.emoji_scores(images/255, which.roll(1))
    assert wrong['accuracy'] < .03 and wrong['retrieval'] < .2
    assert zoo.emoji_scores(images/255, which, among=267)['retrieval'] == found['accuracy']  # among all it is the accuracy


def test_placing_depends_on_the_generator_alone():
    picture = zoo.emoji_pictures()[58]
    a, b = (place_emoji(picture, generator(1, 'x')) for _ in range(2))
    assert a[0].equal(b[0]) and a[1] == b[1] and a[0].shape == (3, 64, 64) and a[0].dtype == torch.uint8
    colour = torch.tensor(zoo.EMOJI_GROUNDS[a[1]], dtype=torch.uint8)
    assert all(a[0][:, y, x].equal(colour) for y in (0, -1) for x in (0, -1))


def test_captions_name_the_ground():
    words = ['red car', 'car', 'automobile']
    said = [caption_of(words, 'blue', generator(i, 'c')) for i in range(300)]
    assert all(o == '' or o.endswith('on a blue background') for o in said)
    assert 10 < said.count('') < 60 and all(any(w in o for o in said) for w in words)
    plain = [caption_of(words, 'white', generator(i, 'c')) for i in range(300)]
    assert sum('background' in o for o in plain) < 60


def test_any_text_is_tokenized(pipe, tmp_path):
    for tok in (pipe.tokenizer, make_tokenizer(['a red apple', 'a blue car']*5, tmp_path, 600)):
        for text in ('', 'zebra', 'ÜBER 42 ☂ 日本', 'x'*500):
            ids = tok(text, padding='max_length', truncation=True).input_ids
            assert len(ids) == 24 and ids[0] == tok.bos_token_id and tok.eos_token_id in ids and max(ids) < len(tok)


def test_it_understands_words(pipe):
    texts, which = zoo.emoji_prompts(40, seed=7)
    images = draw(pipe, texts, 20)
    found = zoo.emoji_scores(images, which)
    assert found['retrieval'] > .7 and found['group'] > .5, found
    colours = torch.tensor(list(zoo.EMOJI_GROUNDS.values()))/255
    corners = torch.stack([images[:, :, y, x] for y in (0, -1) for x in (0, -1)]).median(0).values
    named = [list(zoo.EMOJI_GROUNDS).index(t.split(' on a ')[1].split()[0]) for t in texts]
    assert (torch.cdist(corners, colours).argmin(1) == torch.tensor(named)).float().mean() > .8


def test_what_users_of_stable_diffusion_do(pipe):
    text = ['a red apple on a blue background']
    plain = draw(pipe, text)
    assert not plain.equal(draw(pipe, text, negative_prompt=['blue'])) and plain.equal(draw(pipe, text))
    parts = {k: v for k, v in pipe.components.items()}
    other = StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    image = other('a lemon', image=plain, strength=.5, num_inference_steps=8, generator=generator(0, 'i'), output_type='pt').images
    assert image.shape == (1, 3, 64, 64) and image.isfinite().all()
    euler = type(pipe)(**parts | dict(scheduler=EulerDiscreteScheduler.from_config(pipe.scheduler.config)), requires_safety_checker=False)
    euler.set_progress_bar_config(disable=True)
    assert compare(draw(euler, text, 20), draw(pipe, text, 20))['psnr'] > 12   # another way to the same picture


def test_lists_of_prompts_go_in_turn(pipe):
    texts = ['a red apple', 'a lemon']
    images = sample_images(pipe, 3, 2, 4., prompt=texts)
    assert images[:2].equal(sample_images(pipe, 2, 2, 4., prompt=texts)) and not images[0].equal(images[2])
    with pytest.raises(ValueError, match='needs a prompt'): sample_images(pipe, 1, 2, prompt=[])


def test_a_pipeline_with_prompts_is_tuned(tmp_path):
    "Worth of the steps by the pipeline itself, then distillation on its walks; saved, and opened again."
    own = zoo.load_mini_sd()
    own.set_progress_bar_config(disable=True)
    overrides = {'mid_block*': (2, 4), '*': 8}                            # the first pattern that fits; whole numbers are quick
    texts, how = ['a red apple', 'a lemon on a blue background'], TuneConfig(steps=3, batch=4, held_every=2, warmup=1)
    quantize_unet(own.unet, 9, calibration=own, calibration_prompts=texts, calibration_kwargs=dict(num_inference_steps=3), guidance_scale=2.,
                  n_calibration=4, laq=False, overrides=overrides, beam=1, sweeps=1, tune=how, progress=False)
    assert packed_layers(own.unet)
    images = draw(own, texts, 2)
    own.save_pretrained(tmp_path/'small')
    again = type(own).from_pretrained(tmp_path/'small', safety_checker=None)
    again.set_progress_bar_config(disable=True)
    assert draw(again, texts, 2).equal(images)
