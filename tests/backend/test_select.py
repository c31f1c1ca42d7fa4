import subprocess
import sys

import pytest

from localllm.backend import select
from localllm.backend.select import available_backends, choose_backend, open_backend
from localllm.errors import BackendUnavailable, InvalidRequest
from tests.backend.random_models import dense, hybrid, llama, random_weights


def opened(name, spec=None, **options):
    spec = spec or llama()
    weights = iter(dense(random_weights(spec)).items())
    return open_backend(name, spec, weights, num_blocks=2, **options)


def test_without_a_name_the_best_backend_of_the_machine_opens():
    best = next(status for status in available_backends() if status.available)
    assert opened(None).name == best.name == choose_backend(None).name


def test_a_backend_opens_by_its_name():
    backend = opened("reference")
    assert backend.name == "reference"
    assert backend.num_blocks == 2


def test_every_backend_says_what_it_is_or_what_it_lacks():
    statuses = available_backends()
    assert "reference" in [status.name for status in statuses]
    assert all(status.reason for status in statuses)


def test_an_unknown_name_is_answered_with_those_there_are():
    with pytest.raises(BackendUnavailable, match="'cuda'") as error:
        opened("cuda")
    assert "reference" in error.value.hint


def test_a_backend_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(select.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendUnavailable, match="MLX is not installed") as error:
        choose_backend("reference")
    assert "pip install" in error.value.hint


def test_a_thread_limit_below_one_makes_no_sense():
    with pytest.raises(InvalidRequest, match="at least 1, not 0"):
        opened(None, threads=0)


def test_on_linux_the_reference_keeps_any_thread_limit_by_using_one():
    if sys.platform == "darwin":
        pytest.skip("Accelerate picks its own threads")
    assert opened("reference", threads=1).name == "reference"
    assert opened("reference", threads=64).name == "reference"


def test_on_macos_a_thread_limit_that_cannot_be_kept_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(select.sys, "platform", "darwin")
    with pytest.raises(InvalidRequest, match="cannot limit its threads"):
        opened("reference", threads=2)


def test_what_is_said_of_a_backend_before_it_opens_is_true_of_it():
    able = [status for status in available_backends() if status.available]
    assert {"reference", "cpu"} <= {status.name for status in able}
    for status in able:
        backend = opened(status.name)
        assert backend.step_rows == status.step_rows
        assert backend.activations == status.activations[0]


@pytest.mark.parametrize("name", ["reference", "cpu", "metal"])
def test_every_backend_keeps_as_many_states_as_asked(name, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(select.EMULATOR, "1")
    assert opened(name, hybrid(), state_slots=5).state_slots == 5


def test_activations_are_as_asked_or_refused_with_the_reason():
    assert opened("cpu", activations="float32").activations == "float32"
    assert opened("cpu", activations="int8").activations == "int8"
    assert opened("reference", activations="float32").activations == "float32"
    with pytest.raises(InvalidRequest, match=r"reference backend computes with float32.*not int8"):
        opened("reference", activations="int8")
    with pytest.raises(InvalidRequest, match="int8, float32, not 'fp8'"):
        opened("cpu", activations="fp8")


def test_looking_for_backends_does_not_import_mlx():
    code = (
        "import sys; from localllm.backend.select import available_backends, choose_backend;"
        "available_backends(); choose_backend(None);"
        "assert not any(name.startswith('mlx.') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
