"""The README's Python runs word for word, and its commands are flags that exist."""

import re
import shlex
import shutil

import pytest
import timm
import torch
from conftest import ROOT
from timm.data import ImageNetInfo

import benchmark
import engine
import export
import main_deit
import models
import visualize
from experiments import tables

PAGES = [*sorted(ROOT.glob('*.md')), *sorted((ROOT / 'docs').glob('*.md'))]
COMMANDS = sorted(
    {
        line.strip()
        for page in PAGES
        for language, block in re.findall(r'^```(\w*)\n(.*?)^```$', page.read_text(), re.M | re.S)
        for line in block.replace('\\\n', '').splitlines()  # a command may go on in the next line
        if not language and re.search(r'(main_deit|main_levit|benchmark|visualize|export)\.py ', line + ' ')
    }
)

# Commands of the README that show what they print.
PRINTED = []
for language, block in re.findall(r'^```(\w*)\n(.*?)^```$', (ROOT / 'README.md').read_text(), re.M | re.S):
    for line in block.splitlines() if not language else ():
        if line.startswith('python3 '):
            PRINTED.append((line, []))
        elif line.startswith('#> '):
            PRINTED[-1][1].append(line[3:])
PRINTED = [(command, lines) for command, lines in PRINTED if lines]
assert len(PRINTED) >= 4
# What makes each of them small enough for a test; the numbers are others then.
SMALL = {
    'main_deit --eval': '--num_workers 0 --device cpu',
    'main_deit': '--num_workers 0 --device cpu --epochs 1 --batch-size 4 --input-size 32 --no-model-ema',
    'benchmark': '--num_bench_iter 2 --num_warm_iter 1 -b 1 --img_size 32 --device cpu',
    'visualize': '--device cpu',
}


@pytest.mark.parametrize(('command', 'lines'), PRINTED, ids=[command[:80] for command, _ in PRINTED])
def test_commands_print_what_the_readme_shows(command, lines, script, image_folder, monkeypatch, tmp_path):
    """On a few small images, with random weights: every line is there, up to its numbers."""
    monkeypatch.chdir(ROOT)
    name, flags = re.search(r'(\w+)\.py ?(.*)', command).groups()
    model = re.search(r'--model (\S+)', flags)[1].replace('_vis_', '_')
    torch.save({'model': timm.create_model(model).state_dict()}, tmp_path / 'weights.pth')
    data = tmp_path / 'data'  # folders named as those of ImageNet
    for split in ('train', 'val'):
        for folder, synset in zip(sorted((image_folder / split).iterdir()), ImageNetInfo().label_names(), strict=False):
            shutil.copytree(folder, data / split / synset)
    paths = {'/path/to/imagenet': data, '/path/to/save': tmp_path / 'save'}
    for path in ('/path/to/checkpoint.pth', f'{model}.pth'):
        paths[path] = tmp_path / 'weights.pth'
    small = SMALL[f'{name} --eval' if '--eval' in flags else name]
    words = [str(paths.get(word, word)) for word in shlex.split(f'{flags} {small}')]
    said = script(name, *words)
    for path, own in paths.items():
        said = said.replace(str(own), path)

    def mask(line: str) -> str:
        return ' '.join(re.sub(r'\d[\d,.:]*', '0', line).split())

    said = [mask(line) for line in said.splitlines()]
    assert [line for line in lines if mask(line) not in said] == []


def test_the_tables_are_those_of_the_rows():
    tables.main(['--check'])


def test_the_python_of_the_readme_runs(monkeypatch, tmp_path):
    """One block after another, as a reader would; only what must be downloaded is made here."""
    create, saved = timm.create_model, tmp_path / 'checkpoint.pth'
    torch.save(create('evo_deit_small_patch16_224').state_dict(), saved)
    monkeypatch.chdir(ROOT)

    def create_without_download(name, pretrained=False, **options):
        return create(name, pretrained and name.startswith('local-dir:'), **options)

    monkeypatch.setattr(timm, 'create_model', create_without_download)
    blocks = re.findall(r'^```python\n(.*?)^```', (ROOT / 'README.md').read_text(), re.M | re.S)
    assert len(blocks) >= 4
    names, checked = {}, set()
    for block in blocks:
        code = block.replace('/path/to/checkpoint.pth', str(saved)).replace("folder'", f"{tmp_path}/folder'")
        exec(code, names)
        if 'program =' in block:
            checked.add('model')
            assert [tuple(grid.shape) for grid in names['grids']] == [(2, 192, 14, 14)] * 3
            assert names['tokens'].shape == (2, 197, 192) and names['selection']['blocks.8'].shape == (2, 58)
            x = torch.randn(3, 3, 224, 224)
            torch.testing.assert_close(names['program'].module()(x), names['model'](x), rtol=1e-3, atol=1e-3)
        if 'evolved =' in block:
            checked.add('hub')
            torch.testing.assert_close(names['evolved'].eval()(x), names['model'](x), rtol=0, atol=1e-6)
            assert not torch.equal(names['dense'].eval()(x), names['model'](x))
        if 'published =' in block:
            checked.add('published')
            assert 'qks.0.qk.weight' in names['published']
    assert checked == {'model', 'hub', 'published'}


def test_the_grad_cam_of_the_documentation_runs(monkeypatch, tmp_path):
    """Dense's map equals that of timm's model by a hook; the evolved one is like it."""
    torch.manual_seed(0)
    timms, outputs = timm.create_model('deit_tiny_patch16_224').eval(), []
    for parameter in timms.parameters():
        parameter.data += 0.03 * torch.randn_like(parameter)  # fresh weights attend alike to all
    torch.save(timms.state_dict(), tmp_path / 'deit_tiny_patch16_224.pth')
    (tmp_path / 'imgs').symlink_to(ROOT / 'imgs')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('MPLBACKEND', 'Agg')
    (code,) = re.findall(r'^```python\n(.*?)^```', (ROOT / 'docs' / 'training.md').read_text(), re.M | re.S)
    names = {}
    exec(code, names)
    assert (tmp_path / 'grad_cam.jpg').stat().st_size > 10_000

    timms.blocks[7].register_forward_hook(lambda module, args, out: outputs.append(out))
    logit = timms(names['images']).amax()
    (gradient,), grid = torch.autograd.grad(logit, outputs), outputs[0][0, 1:]
    expected = (grid @ gradient[0, 1:].mean(0)).relu().unflatten(0, (14, 14))
    dense, evolved = names['dense'][0], names['evolved'][0]
    assert expected.max() > 0
    torch.testing.assert_close(dense, expected, rtol=1e-4, atol=1e-5 * expected.max().item())
    assert evolved.shape == (14, 14) and evolved.isfinite().all() and not torch.equal(evolved, dense)
    assert torch.stack([dense.flatten(), evolved.flatten()]).corrcoef()[0, 1] > 0.5


@pytest.mark.parametrize('command', COMMANDS)
def test_commands_have_flags_that_exist(command, monkeypatch):
    command = re.sub(r'\$\w+', '1', command)
    words = shlex.split(command)
    script = next(i for i, word in enumerate(words) if word.endswith('.py') and word != 'setup.py')
    name, flags = words[script].removesuffix('.py'), words[script + 1 :]
    parsers = {'benchmark': benchmark.get_parser, 'visualize': visualize.get_parser, 'export': export.get_parser}
    if name in parsers:
        _, unknown = parsers[name]().parse_known_args(flags)
        if name == 'benchmark':  # which gives the rest to the parser of training
            _, unknown = engine.get_parser('', main_deit.RECIPE).parse_known_args(unknown)
    else:
        module = __import__(name)
        parser = module.get_parser() if hasattr(module, 'get_parser') else engine.get_parser('', module.RECIPE)
        args, unknown = parser.parse_known_args(flags)
        assert timm.is_model(args.model)
    assert not unknown


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r'\]\(([^)\s]+)\)', page.read_text()):
            path, _, anchor = target.partition('#')
            if '://' in target:
                continue
            file = page.parent / path if path else page
            assert file.exists(), f'{page.name}: {target}'
            titles = (
                [
                    re.sub(r'[^\w -]', '', line.lstrip('# ').lower()).replace(' ', '-')
                    for line in file.read_text().splitlines()
                    if line.startswith('#')
                ]
                if anchor
                else []
            )
            assert not anchor or anchor in titles, f'{page.name}: {target}'


def test_each_case_of_reliability_has_a_test():
    cells = re.findall(r'^\| ([\d, to]+) \|', (ROOT / 'docs' / 'reliability.md').read_text(), re.M)
    cases = []
    for first, last in re.findall(r'(\d+)(?: to (\d+))?', ', '.join(cells)):
        cases += range(int(first), int(last or first) + 1)
    tests = '\n'.join(path.read_text() for path in (ROOT / 'tests').glob('*.py'))
    names = ' '.join(re.findall(r'^def test_(row_\w+)', tests, re.M))
    assert sorted({int(number) for number in re.findall(r'row_(\d+)', names)}) == sorted(cases)


def test_the_changelog_begins_with_this_version():
    versions = re.findall(r'^## (\S+)', (ROOT / 'CHANGELOG.md').read_text(), re.M)
    assert [version for version in versions if version != 'Unreleased'][0] == models.__version__
