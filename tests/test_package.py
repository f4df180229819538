"""The networks as a package: installed as evo_vit, beside anybody's own modules."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

EXAMPLE = """
import importlib.metadata, timm, torch, evo_vit, utils, datasets
assert importlib.metadata.version('evo-vit') == evo_vit.__version__
assert utils.mine and datasets.mine
timm.create_model('EvoLeViT_128S', img_size=64)
model = evo_vit.evolve(timm.create_model('vit_tiny_patch16_224', img_size=64))
logits, selection = model.forward_with_selection(torch.randn(1, 3, 64, 64))
print(evo_vit.load_weights(model, {'model': model.state_dict()}), len(selection))
"""


@pytest.mark.slow
def test_installed_it_lives_beside_other_modules(tmp_path):
    pytest.importorskip('setuptools')
    project, site, user = tmp_path / 'project', tmp_path / 'site', tmp_path / 'user'
    project.mkdir(), user.mkdir()  # building writes beside the sources: into a copy
    for name in ('pyproject.toml', 'requirements.txt', 'README.md', 'models'):
        subprocess.run(['cp', '-r', ROOT / name, project], check=True)
    install = [sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps', '--no-build-isolation', '--target', site]
    subprocess.run([*install, project], check=True, timeout=300)
    for name in ('utils', 'datasets'):
        (user / f'{name}.py').write_text('mine = True')
    run = subprocess.run(
        [sys.executable, '-c', EXAMPLE], cwd=user, env={'PYTHONPATH': str(site)}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith('Loaded(missing=[], dropped=[]')


def imports(path: Path) -> set[str]:
    """The first part of the names of the modules that a file imports, '' for its own package."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split('.')[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add('' if node.level else node.module.split('.')[0])
    return found


def test_no_arrow_leads_out_of_the_networks_and_none_back_up():
    ours = {path.stem for path in ROOT.glob('*.py')} | {'models'}
    for path in ROOT.glob('models/*.py'):
        assert not imports(path) & ours, path
    # A module imports only what stands below it.
    below = {'models': set()}
    todo = {path.stem: imports(path) & ours for path in ROOT.glob('*.py')}
    while todo:
        ready = [name for name, needs in todo.items() if needs <= set(below)]
        assert ready, f'these import each other: {todo}'
        for name in ready:
            below[name] = todo.pop(name)
