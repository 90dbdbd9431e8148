import json
import re

import pytest
import torch

from qatkernels.grids import affine, lsq, seq
from qatkernels.nn import QuantConfig
from qatkernels.nn.config import SCALE_INITS, SEARCHES


def test_grids():
    assert QuantConfig().grid == seq(2)
    assert QuantConfig(4, "affine").grid == affine(4)
    assert QuantConfig(act_bits=8).act_grid is None
    assert QuantConfig(act_bits=4, act_scheme="lsq").act_grid == lsq(4)
    assert QuantConfig(act_bits=4, act_scheme="lsq", act_signed=False).act_grid == affine(4)
    assert QuantConfig(act_bits=4, act_scheme="lsq+").act_grid == affine(4)
    assert QuantConfig(act_bits=8).out_grid is None
    assert QuantConfig(out_bits=8).out_grid == lsq(8)


def test_is_frozen_and_hashable():
    config = QuantConfig(4)
    assert {config: 1}[QuantConfig(4)] == 1
    with pytest.raises(AttributeError):
        config.bits = 2


def test_scale_inits_are_those_of_the_grid_and_the_searches():
    for method in SCALE_INITS:
        assert method in SEARCHES or affine(4).init_scale(torch.randn(2, 4), method=method).shape == (2,)
        assert QuantConfig(4, "affine", scale_init=method).scale_init == method


@pytest.mark.parametrize(
    "config",
    [
        QuantConfig(),
        QuantConfig(1.58, group_size=64),
        QuantConfig(4, act_bits=4, act_scheme="lsq", act_signed=False),
        QuantConfig(2, out_bits=8),
    ],
)
def test_round_trip_through_json(config):
    assert QuantConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_from_dict_takes_defaults_and_refuses_unknown_fields():
    assert QuantConfig.from_dict({"bits": 4}) == QuantConfig(4)
    with pytest.raises(ValueError, match=r"unknown fields \['groupsize'\], must be among \['bits', "):
        QuantConfig.from_dict({"bits": 4, "groupsize": 64})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 9}, "bits is 9, 'paretoq' exists for 1, 1.58, 2"),
        ({"bits": "2"}, "bits is '2', must be a number"),
        ({"bits": True, "scheme": "binary"}, "bits is True, must be a number"),
        ({"bits": None}, "bits is None, must be a number"),
        ({"bits": 3, "scheme": "binary"}, "bits is 3, 'binary' exists for 1 bits"),
        ({"scheme": "nf4"}, "scheme is 'nf4', must be 'paretoq' or one of"),
        ({"scheme": 4}, "scheme is 4, must be a string"),
        ({"group_size": 0}, "group_size is 0, must be a positive integer or None"),
        ({"group_size": 64.0}, "group_size is 64.0, must be a positive integer or None"),
        ({"group_size": True}, "group_size is True, must be a positive integer or None"),
        ({"group_size": 64, "per_tensor": True}, "group_size is 64 with per_tensor=True, give one of them"),
        ({"per_tensor": 1}, "per_tensor is 1, must be True or False"),
        (
            {"scale_init": "activatoin"},
            "scale_init is 'activatoin', must be None or one of ('max', 'mean', 'lsq', 'range', 'mse', 'activation'); "
            "did you mean 'activation'?",
        ),
        ({"scale_init": 3}, "scale_init is 3, must be None or one of"),
        ({"scale_init": "range"}, "scale_init is 'range' with scheme 'seq', it is for scheme 'affine'"),
        ({"act_bits": 1}, "act_bits is 1, must be None or an integer from 2 to 8"),
        ({"act_bits": 8.0}, "act_bits is 8.0, must be None or an integer from 2 to 8"),
        ({"act_bits": 8, "act_scheme": "static"}, "act_scheme is 'static', must be one of ('dynamic', 'lsq', 'lsq+')"),
        ({"act_scheme": "lsq"}, "act_scheme is 'lsq' with act_bits=None, give act_bits 2 to 8"),
        ({"out_bits": 9}, "out_bits is 9, must be None or an integer from 2 to 8"),
        ({"out_bits": True}, "out_bits is True, must be None or an integer from 2 to 8"),
        ({"act_bits": 8, "act_signed": False}, "act_signed is False with act_scheme 'dynamic', it is for"),
        ({"act_bits": 8, "act_scheme": "lsq", "act_signed": 0}, "act_signed is 0, must be True or False"),
    ],
    ids=str,
)
def test_refuses(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        QuantConfig(**fields)
