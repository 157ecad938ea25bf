"""Parameter structs on the host: fields are set by name, and land where the dtypes say."""

import ctypes
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest

from mla_fp8._cuda.params import PARAMS, struct_type

STRUCTS = {
    f"{template}: {name}": dtype
    for template, params in PARAMS.items()
    for name, dtype in {"Params": params.dtype, **params.structs}.items()
}


def _value(number: int, dtype: np.dtype):
    """A value for a field, and its bytes; each number gives another value."""
    if dtype.names or dtype.subdtype:
        raw = bytes([number]) * dtype.itemsize
        holder = struct_type(np.dtype([("field", dtype)])).from_buffer_copy(raw)
        return holder.field, raw
    number = np.array(number, dtype)
    return number.item(), number.tobytes()


@pytest.mark.parametrize("name", STRUCTS)
def test_each_field_is_set_and_nothing_else(name):
    dtype = STRUCTS[name]
    struct = struct_type(dtype)()
    assert ctypes.sizeof(struct) == dtype.itemsize
    wanted = bytearray(dtype.itemsize)
    for number, field in enumerate(dtype.names, 1):
        value, raw = _value(number, dtype[field])
        setattr(struct, field, value)
        offset = dtype.fields[field][1]
        wanted[offset : offset + len(raw)] = raw
        assert bytes(struct) == wanted


@pytest.mark.parametrize("name", STRUCTS)
def test_a_field_that_is_not_there_is_refused(name):
    with pytest.raises(AttributeError, match="first_key_of_all"):
        struct_type(STRUCTS[name])().first_key_of_all = 0


def test_a_struct_in_a_struct():
    inner = np.dtype([("a", "i4"), ("b", "f4")], align=True)
    outer = np.dtype([("before", "u8"), ("inner", inner), ("after", "i4")], align=True)
    mine, struct = struct_type(inner)(), struct_type(outer)()
    mine.a, mine.b = -1, 0.5
    struct.before, struct.inner, struct.after = 7, mine, -9
    mine.a = 3  # the outer struct has a copy
    assert np.frombuffer(struct, outer, count=1)[0].item() == (7, (-1, 0.5), -9)


def test_a_dtype_with_another_layout_is_refused():
    with pytest.raises(TypeError, match="b stands at 8, not at 4"):
        struct_type(np.dtype([("a", "i4"), ("b", "u8")]))


@pytest.mark.parametrize(("field", "value"), [("b", "x"), ("a", 0.5)])
def test_values_of_a_wrong_type_are_refused(field, value):
    struct = struct_type(np.dtype([("a", "i4"), ("b", "f4")]))()
    with pytest.raises(TypeError):
        setattr(struct, field, value)


def test_threads_that_ask_at_once_get_one_class():
    """A field that is a struct refuses instances of another class, even one with equal fields."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as threads:
            for i in range(30):
                inner = np.dtype([(f"x{i}", np.int32), ("y", np.int64)], align=True)
                outer = np.dtype([("inner", inner), (f"z{i}", np.int32)], align=True)
                begin = Barrier(8)

                def make(begin=begin, inner=inner, outer=outer):
                    begin.wait(60)
                    return struct_type(inner), struct_type(outer)

                made = {done.result() for done in [threads.submit(make) for _ in range(8)]}
                assert len(made) == 1
                ((inside, outside),) = made
                outside().inner = inside()  # else a TypeError
    finally:
        sys.setswitchinterval(interval)
