"""Parameter structs on the host: fields are set by name, and land where the dtypes say."""

import numpy as np
import pytest

from mla_fp8._cuda.launch import Struct
from mla_fp8._cuda.params import PARAMS

STRUCTS = {
    f"{template}: {name}": dtype
    for template, params in PARAMS.items()
    for name, dtype in {"Params": params.dtype, **params.structs}.items()
}


def _value(number: int, dtype: np.dtype):
    """A value for a field, other than that of any other number."""
    if dtype.subdtype or dtype.names:
        return bytes([number]) * dtype.itemsize
    return float(number) if dtype.kind == "f" else number


@pytest.mark.parametrize("name", STRUCTS)
def test_each_field_is_set_and_nothing_else(name):
    dtype = STRUCTS[name]
    values = {f: _value(i + 1, dtype.fields[f][0]) for i, f in enumerate(dtype.names)}
    struct = Struct(dtype)
    for field, value in values.items():
        struct.set(**{field: value})
    found = np.frombuffer(struct.bytes, dtype, count=1)[0]
    for field, value in values.items():
        mine = found[field].tobytes() if isinstance(value, bytes) else found[field]
        assert mine == value
    assert Struct(dtype, **values).bytes == struct.bytes


@pytest.mark.parametrize("name", STRUCTS)
def test_a_field_that_is_not_there_is_refused(name):
    with pytest.raises(KeyError, match="first_key_of_all"):
        Struct(STRUCTS[name], first_key_of_all=0)


def test_a_struct_in_a_struct():
    inner = np.dtype([("a", "i4"), ("b", "f4")], align=True)
    outer = np.dtype([("before", "u8"), ("inner", inner), ("after", "i4")], align=True)
    struct = Struct(outer, before=7, inner=Struct(inner, a=-1, b=0.5), after=-9)
    assert np.frombuffer(struct.bytes, outer, count=1)[0].item() == (7, (-1, 0.5), -9)


@pytest.mark.parametrize(("field", "value"), [("a", 1 << 31), ("b", "x"), ("a", 0.5)])
def test_values_that_do_not_fit_are_refused(field, value):
    with pytest.raises((ValueError, TypeError)):
        Struct(np.dtype([("a", "i4"), ("b", "f4")]), **{field: value})
