"""The three ways to register an encoder, and the errors."""

import sys
from importlib.metadata import EntryPoint

import numpy as np
import pytest
import torch

from speechbrain_ext import registry
from speechbrain_ext.utils.errors import UserError


class Passing(torch.nn.Module):
    def __init__(self, d_model=8):
        super().__init__()
        self.d_model = d_model


@pytest.fixture
def clean_registry(monkeypatch):
    registry.list_encoders()
    monkeypatch.setattr(registry, "_ENCODERS", dict(registry._ENCODERS))


def test_decorator(clean_registry):
    assert registry.register_encoder("passing")(Passing) is Passing
    assert isinstance(registry.build_encoder("passing", d_model=4), Passing)
    assert "passing" in registry.list_encoders()
    registry.register_encoder("passing")(Passing)  # a module that is imported twice is no conflict
    with pytest.raises(ValueError, match="'passing' is taken by .*Passing"):
        registry.register_encoder("passing")(torch.nn.Linear)


@pytest.mark.parametrize("name", [Passing, 3, None])
def test_a_name_is_a_text(clean_registry, name):
    with pytest.raises(UserError, match=r'The name of an encoder is .*; give a text: @register_encoder\("name"\)'):
        registry.register_encoder(name)
    with pytest.raises(UserError, match="Unknown encoder '.*'; the known ones are: .*conformer"):
        registry.build_encoder([name])


def test_numbers_of_numpy_become_plain_ones(clean_registry):
    registry.register_encoder("passing")(Passing)
    assert type(registry.build_encoder("passing", d_model=np.int64(4)).d_model) is int


def test_constructor_that_hands_on_its_keys(clean_registry):
    @registry.register_encoder("child")
    class Child(Passing):
        def __init__(self, extra=1, **kwargs):
            super().__init__(**kwargs)

    assert registry.encoder_keys("child") == ["extra", "d_model"]
    registry.build_encoder("child", d_model=4)
    with pytest.raises(TypeError, match="no key 'dmodel'"):
        registry.build_encoder("child", dmodel=4)


def test_entry_point(clean_registry, monkeypatch):
    point = EntryPoint("elsewhere", f"{__name__}:Passing", registry.ENTRY_POINT_GROUP)
    monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])
    monkeypatch.setattr(registry, "entry_points", lambda group: [point] if group == registry.ENTRY_POINT_GROUP else [])
    assert "elsewhere" in registry.list_encoders()
    assert isinstance(registry.build_encoder("elsewhere"), Passing)


def test_shipped():
    assert {"conformer", "hyperconformer"} <= set(registry.list_encoders())
