"""Flags, seeds, devices, requirements."""

import random

import numpy as np
import pytest
import torch
from conftest import ROOT
from packaging.requirements import Requirement

import utils
from utils import InputError


@pytest.mark.parametrize('spelling', ['--weight-decay', '--weight_decay', '--weight_decay=3', '--weight-decay=3'])
def test_flags_with_dashes_or_underscores(spelling):
    parser = utils.Parser('')
    parser.add_argument_group('g').add_argument('--weight-decay', type=int)
    parser.add_argument('--output_dir')
    assert parser.parse_args([spelling] if '=' in spelling else [spelling, '3']).weight_decay == 3
    assert parser.parse_args(['--output-dir', 'a_b-c']).output_dir == 'a_b-c'
    with pytest.raises(SystemExit):
        parser.parse_args(['--weight', '3'])


@pytest.mark.parametrize(
    'kind, good, bad, expected',
    [
        (utils.between(0, 1), ['0', '1', '0.5', '1e-9'], ['2', '-1', 'nan', 'inf'], 'a number from 0 to 1'),
        (utils.between(0), ['0', '1e9'], ['-0.1', 'nan', 'inf'], '0 or more'),
        (utils.above_zero, ['0.1', '2'], ['0', '-1', 'nan', 'inf'], 'a number above 0'),
        (utils.at_least(2), ['2', '3'], ['1', '-5'], '2 or more'),
    ],
    ids=['from 0 to 1', 'from 0', 'above 0', 'integer'],
)
def test_types_of_flags_have_a_range(capsys, kind, good, bad, expected):
    parser = utils.Parser('')
    parser.add_argument('--x', type=kind)
    assert [parser.parse_args([f'--x={text}']).x for text in good] == [float(text) for text in good]
    for text in [*bad, 'word']:
        with pytest.raises(SystemExit):
            parser.parse_args([f'--x={text}'])
        error = capsys.readouterr().err
        assert f'expected {expected}, found {text} ' in error if text in bad else "value: 'word'" in error


def test_a_key_decides_all_random_numbers():
    def draw(*key):
        utils.seed_all(*key)
        return random.random(), np.random.rand(), torch.rand(1).item(), torch.randn(3).tolist()

    assert draw(1, 2, 3) == draw(1, 2, 3)
    assert len({draw(*key)[0] for key in [(1, 2, 3), (1, 3, 2), (2, 2, 3), (1, 2)]}) == 4


@pytest.mark.parametrize('wanted', ['cuda:99', 'nonsense'])
def test_a_device_that_is_not_there(wanted):
    with pytest.raises(InputError, match=f'--device {wanted}: .*Without --device'):
        utils.pick_device(wanted, 0)


def test_row_42_constraints_pin_every_requirement_within_its_range():
    pins = dict(line.split('==') for line in (ROOT / 'constraints.txt').read_text().splitlines() if line[0] != '#')
    requirements = [Requirement(line) for name in ('requirements.txt', 'requirements-dev.txt')
                    for line in (ROOT / name).read_text().splitlines() if line[0] not in '#-']  # fmt: skip
    assert {requirement.name for requirement in requirements} >= {'torch', 'torchvision', 'timm', 'pillow'}
    for requirement in requirements:
        assert pins[requirement.name] in requirement.specifier
