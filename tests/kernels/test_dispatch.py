"""Which back end is chosen, and the sentence that says why."""

import importlib.machinery

import pytest
import torch

from zotune.cli import doctor
from zotune.errors import KernelError
from zotune.kernels import dispatch, native, openmp
from zotune.kernels.contract import Run, Term
from zotune.kernels.dispatch import choice_for, using
from zotune.kernels.reference import ReferenceBackend

anew = dispatch._choose.__wrapped__  # the choice as a new process makes it


@pytest.fixture
def no_file(monkeypatch):
    """As if no compiler had been there when zotune was installed."""
    monkeypatch.setattr(native, "EXTENSION_SUFFIXES", [".not-there"])


def test_compiled_kernels_are_taken_where_they_are(native, monkeypatch):
    monkeypatch.delenv("ZOTUNE_KERNELS", raising=False)
    choice = anew("cpu")
    assert choice.backend.name == "native"
    assert "compiled when zotune was installed" in choice.reason
    assert native.level() in choice.reason
    assert native.runtime.reason in choice.reason


def test_pure_torch_where_they_are_missing(no_file, monkeypatch):
    monkeypatch.delenv("ZOTUNE_KERNELS", raising=False)
    choice = anew("cpu")
    assert choice.backend.name == "reference"
    assert "C compiler" in choice.reason
    assert "reinstall" in choice.reason


def test_a_file_that_does_not_load(tmp_path, monkeypatch):
    monkeypatch.delenv("ZOTUNE_KERNELS", raising=False)
    broken = tmp_path / f"_native{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(dispatch, "compiled_file", lambda: broken)
    choice = anew("cpu")
    assert choice.backend.name == "reference"
    assert "does not load" in choice.reason


def test_a_file_of_another_version(native, monkeypatch):
    monkeypatch.delenv("ZOTUNE_KERNELS", raising=False)
    monkeypatch.setattr("zotune.kernels.native.ABI", -1)
    choice = anew("cpu")
    assert choice.backend.name == "reference"
    assert "another version" in choice.reason


def test_a_file_that_rounds_otherwise(native, monkeypatch):
    """Compiled with -ffast-math, say. Here the answers are spoilt by hand."""
    monkeypatch.delenv("ZOTUNE_KERNELS", raising=False)
    right = type(native).add
    monkeypatch.setattr(type(native), "add", lambda self, out, *rest: (right(self, out, *rest), out.mul_(1 + 2**-23)))
    choice = anew("cpu")
    assert choice.backend.name == "reference"
    assert "-ffast-math" in choice.reason


def test_forced_reference(monkeypatch):
    monkeypatch.setenv("ZOTUNE_KERNELS", "reference")
    for kind in ("cpu", "cuda"):
        choice = anew(kind)
        assert choice.backend.name == "reference"
        assert "ZOTUNE_KERNELS=reference" in choice.reason


def test_forced_native(native, monkeypatch):
    monkeypatch.setenv("ZOTUNE_KERNELS", "native")
    assert "ZOTUNE_KERNELS=native" in anew("cpu").reason


def test_forced_native_that_is_missing_is_an_error(no_file, monkeypatch):
    monkeypatch.setenv("ZOTUNE_KERNELS", "native")
    with pytest.raises(KernelError, match="C compiler"):
        anew("cpu")


def test_an_unknown_name_is_an_error(monkeypatch):
    monkeypatch.setenv("ZOTUNE_KERNELS", "fast")
    with pytest.raises(KernelError, match=r"native, reference.*'fast'"):
        anew("cpu")


@pytest.mark.parametrize("kind", ["mps", "xpu"])
def test_devices_without_kernels(kind, monkeypatch):
    monkeypatch.delenv("ZOTUNE_KERNELS", raising=False)
    assert anew(kind).backend.name == "reference"


def test_cuda_without_triton(monkeypatch):
    monkeypatch.delenv("ZOTUNE_KERNELS", raising=False)
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None)
    choice = anew("cuda")
    assert choice.backend.name == "reference"
    assert "triton is not installed" in choice.reason


def test_using_is_undone_after_an_exception():
    before, other = choice_for("cpu").backend, ReferenceBackend()

    def fail():
        with using(other):
            assert choice_for("cpu").backend is other
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert choice_for("cpu").backend is before


def test_without_torchs_threads_a_call_runs_on_one(native, monkeypatch):
    monkeypatch.setattr(openmp, "NAMES", ("not_a_function_of_openmp",))
    found = openmp.find_runtime()
    assert found.addresses == ()
    assert "one thread" in found.reason


def test_a_library_that_was_given_no_threads_gives_the_same_bits(native, tmp_path):
    """Loaded anew under another name, so that it has not been told of torch's threads."""
    from zotune.kernels.native import NativeBackend, compiled_file, load

    copy = tmp_path / compiled_file().name
    copy.write_bytes(compiled_file().read_bytes())
    backend = NativeBackend.__new__(NativeBackend)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zotune.kernels.native.find_runtime", lambda: openmp.Runtime((), "none"))
        backend.__init__(load(copy))
    assert backend.team(2) == 1
    run, terms, out = Run(1, 5, 100_000), [Term((1, 2), "normal", 0.5)], [torch.zeros(100_000) for _ in range(2)]
    torch.set_num_threads(2)
    try:
        backend.add(out[0], run, terms)
    finally:
        torch.set_num_threads(1)
    native.add(out[1], run, terms)
    assert torch.equal(*out)


def test_doctor_says_which_and_why(monkeypatch):
    assert doctor._kernels()["noise on the CPU"] == choice_for("cpu").reason

    def refuse(kind):
        raise KernelError("because")

    monkeypatch.setattr(doctor, "choice_for", refuse)
    assert doctor._kernels()["noise on the CPU"] == "off: because"
