"""What is noted of how a result was made."""

import platform
import re

import torch

from headprof._version import __version__
from headprof.utils import run_record


def test_versions():
    found = run_record.library_versions()
    assert list(found) == ["headprof", "torch", "transformers", "python"]
    assert found["headprof"] == __version__ and found["torch"] == torch.__version__
    assert run_record.package_version("pytest")[0].isdigit()
    assert run_record.package_version("no-such-package-at-all") is None


def test_dates_are_in_utc():
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", run_record.today())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", run_record.timestamp())


def test_machine_and_devices(monkeypatch):
    assert run_record.machine() == f"{platform.machine()}, {torch.get_num_threads()} threads"
    assert run_record.processor_name()
    assert run_record.device_name(torch.device("cpu")) == "cpu"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    assert run_record.device_name(torch.device("cuda", 1)) == "GPU 1"


def test_a_device_whose_driver_is_missing_keeps_its_type(monkeypatch):
    def missing(device):
        raise RuntimeError("no driver")

    monkeypatch.setattr(torch.cuda, "get_device_name", missing)
    assert run_record.device_name(torch.device("cuda")) == "cuda"
