"""The layouts and functions that C and Python share, read from the preprocessed C headers: no second copy.

`ffi` knows every type of include/packetstack/abi.h and agent/native/packetstack.h; `lib()` is libpacketstack,
and has the enumerators as well (`lib().PS_MAX_SLOTS`). Both come from the build, so they are loaded when they are
first used.
"""

import hashlib
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

ffi: Any
"""The cffi.FFI object."""

NATIVE = Path(__file__).parent / "native"
"""Where the build installs libraries, BPF objects, the datapath and the declarations."""

SHARED = (
    "ps_stamp",
    "ps_marker",
    "ps_end",
    "ps_listener_key4",
    "ps_listener_key6",
    "ps_target",
    "ps_allowed4",
    "ps_allowed6",
    "ps_uplink",
    "ps_own_filter",
    "ps_core",
    "ps_progress",
    "ps_journal",
    "ps_ring",
    "ps_descriptor",
    "ps_queue",
    "ps_recycle",
    "ps_engine",
    "ps_entry",
    "ps_flow",
    "ps_shard",
    "ps_shard_form",
    "ps_fence",
    "ps_address",
    "ps_backend",
    "ps_backend_count",
    "ps_listener_name",
    "ps_listener_count",
    "ps_arena",
    "ps_listener",
    "ps_config_backend",
    "ps_config_snat",
    "ps_config",
    "ps_config_file",
    "ps_message",
    "ps_capture",
    "ps_census",
    "ps_watch",
    "ps_watched",
)
"""Structures that lie in shared memory, in BPF maps or on a socket."""


class NativeError(RuntimeError):
    """The native part is missing, or is another version than the Python part."""


def native(name: str) -> Path:
    """The path of a built file such as "packetstack-datapath". Raises NativeError if it was not built."""
    path = NATIVE / name
    if not path.exists():
        raise NativeError(f"{path}: not built; run `make build`")
    return path


@cache
def _ffi() -> Any:
    declared = native("packetstack.cdef").read_text()
    parsed = NATIVE / "declarations.py"  # by the build; parsing takes a tenth of a second
    spec = spec_from_file_location("packetstack_declarations", parsed) if parsed.exists() else None
    if spec and spec.loader:
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        if hashlib.sha256(declared.encode()).hexdigest() == module.PARSED:
            return module.ffi
    import cffi

    ffi = cffi.FFI()
    ffi.cdef(declared)
    return ffi


@cache
def lib() -> Any:
    """libpacketstack, loaded once, its layouts checked. Raises NativeError."""
    path = native("libpacketstack.so")
    try:
        library = _ffi().dlopen(str(path))
    except OSError as e:
        raise NativeError(f"{path}: cannot be loaded ({e}); run `make build`") from None
    _check(library)
    return library


def check_layout() -> None:
    """Raises NativeError if a shared structure has another size in libpacketstack than in the declarations."""
    lib()


def _check(library: Any) -> None:
    ffi = _ffi()
    for name in SHARED:
        here, there = ffi.sizeof(f"struct {name}"), library.ps_size_of(name.encode())
        if here != there:
            raise NativeError(
                f"struct {name}: {there} bytes in libpacketstack.so, {here} in packetstack.cdef; run `make build`"
            )


@cache
def enum_names(enum: str) -> dict[int, str]:
    """Value -> enumerator of a C enum such as "ps_counter"."""
    # cffi would guess an empty enum for a name that it does not know.
    if f"enum {enum} {{" not in native("packetstack.cdef").read_text():
        raise NativeError(f"enum {enum}: not declared in packetstack.cdef; use the name in packetstack/abi.h")
    return dict(sorted(_ffi().typeof(f"enum {enum}").elements.items()))


def __getattr__(name: str) -> Any:
    # `ffi` needs the built declarations, so it is made when it is first asked for.
    if name == "ffi":
        return _ffi()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
