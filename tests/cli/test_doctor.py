"""``mergekit-bio doctor`` as a user runs it: a process, its output and its exit code, with real faults around it."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hub.server import Hub, running_hub
from hub_cache import ADAPTER, BASE, put_in_cache
from tiny_naturelm import make_base, make_naturelm

from mergekit_bio import diagnosis
from mergekit_bio.engine.vllm.plugin import SUPPORTED_VLLM

MAIN = "from mergekit_bio.cli.app import main; main()"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as hub:
        hub.create(BASE)
        hub.create(ADAPTER)
        yield hub


@pytest.fixture
def beside(tmp_path: Path) -> Path:
    """A folder that Python looks into first. Its vLLM fails at once, where the real one would take ten seconds."""
    folder = tmp_path / "beside"
    package(folder, "vllm", SUPPORTED_VLLM + ".0", code="raise ImportError('libowl.so: no such file')")
    return folder


def package(folder: Path, name: str, release: str, *, code: str | None = None, requires: tuple[str, ...] = ()) -> None:
    metadata = folder / f"{name.replace('-', '_')}-{release}.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    lines = [
        "Metadata-Version: 2.4",
        f"Name: {name}",
        f"Version: {release}",
        "Provides-Extra: eval",
        "Provides-Extra: page",
    ]
    metadata.write_text("\n".join([*lines, *(f"Requires-Dist: {line}" for line in requires)]) + "\n")
    if code is not None:
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(code)


def run(home: Path, *options: str, endpoint: str, program: str = MAIN, **environment: str) -> Any:
    """Run doctor in ``home``, with the hub's cache in there."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING", "TRANSF"))}
    kept |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home / "hf")} | environment
    command = [sys.executable, "-c", program, "doctor", *options]
    return subprocess.run(command, env=kept, cwd=home, capture_output=True, text=True)


def findings(home: Path, **options: str) -> dict[str, dict[str, str]]:
    done = run(home, "--json", **options)
    assert done.stdout, done.stderr
    document = json.loads(done.stdout)
    found = {finding["name"]: finding for finding in document["findings"]}
    problems = {name for name, finding in found.items() if finding["state"] == "problem"}
    assert document["ready_to_merge"] is (not problems)
    assert done.returncode == (1 if problems else 0)
    assert all(finding["fix"] for finding in found.values() if finding["state"] != "ok")
    return found


def fill_cache(home: Path, *, without_weights: str | None = None) -> None:
    """Lay small models where the hub's client would have put the real ones."""
    for repo, write in ((BASE, make_base), (ADAPTER, make_naturelm)):
        source = home / "sources" / repo.replace("/", "--")
        source.parent.mkdir(exist_ok=True)
        write(source)
        if repo == without_weights:
            (source / "model.safetensors").unlink()
        put_in_cache(home / "hf" / "hub", repo, "0" * 40, source)


def closed_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


def test_names_versions_devices_and_formats_of_this_machine(tmp_path: Path) -> None:
    found = findings(tmp_path, endpoint=closed_port())

    for name in ("torch", "safetensors", "huggingface-hub", "transformers", "datasets", "peft"):
        assert (found[name]["state"], found[name]["detail"]) == ("ok", version(name))
    assert "WAV" in found["audio formats"]["detail"]
    assert {"Python", "mergekit-bio", "GPU", "disk", "memory", "SPICE"} <= found.keys()
    if find_spec("vllm"):
        assert found["vLLM"]["state"] == "ok", found["vLLM"]


def test_all_is_well_where_the_hub_gives_both_models(hub: Hub, beside: Path, tmp_path: Path) -> None:
    found = findings(tmp_path, endpoint=hub.url, HF_TOKEN="hf_owl", PYTHONPATH=str(beside))

    assert found["hub login"]["detail"] == "owl"
    for repo in (BASE, ADAPTER):
        assert (found[repo]["state"], found[repo]["detail"]) == ("ok", "may be downloaded")
    # Whether the disk has room for them is not up to this test.
    assert {name for name, finding in found.items() if finding["state"] == "problem"} <= {"disk"}
    assert not list((tmp_path / "hf").rglob("*.safetensors"))


def test_a_gated_model_is_a_problem_with_the_page_of_its_licence(hub: Hub, beside: Path, tmp_path: Path) -> None:
    hub.create(BASE, gated=True)
    done = run(tmp_path, "--quiet", endpoint=hub.url, HF_TOKEN="hf_owl", PYTHONPATH=str(beside))

    assert done.returncode == 1
    assert done.stderr == ""
    (line,) = [line for line in done.stdout.splitlines() if BASE in line]
    assert line.startswith(f"problem: {BASE}: not at hand; gated, and you have no access -> ")
    assert f"{hub.url}/{BASE}" in line
    assert ADAPTER not in done.stdout


@pytest.mark.parametrize(("token", "said"), [("", "not logged in"), ("hf_expired", "does not accept your token")])
def test_without_a_good_token_it_says_how_to_log_in(
    hub: Hub, beside: Path, tmp_path: Path, token: str, said: str
) -> None:
    done = run(tmp_path, endpoint=hub.url, HF_TOKEN=token, PYTHONPATH=str(beside))

    shown = " ".join(done.stdout.split())
    assert said in shown
    assert "hf auth login" in shown


def test_an_unreachable_hub_is_named_with_what_else_one_can_do(beside: Path, tmp_path: Path) -> None:
    endpoint = closed_port()
    found = findings(tmp_path, endpoint=endpoint, HF_TOKEN="hf_owl", PYTHONPATH=str(beside))

    assert found["hub login"]["state"] == "warning"
    assert f"{endpoint} cannot be reached: " in found["hub login"]["detail"]
    assert found[BASE]["state"] == found[ADAPTER]["state"] == "problem"
    assert "--base DIR --adapter DIR" in found[BASE]["fix"]


def test_a_proxy_that_cannot_be_used_is_named(beside: Path, tmp_path: Path) -> None:
    proxy = f"socks5://{closed_port().removeprefix('http://')}"
    found = findings(tmp_path, endpoint="http://hub.invalid", HTTP_PROXY=proxy, PYTHONPATH=str(beside))

    assert "cannot be reached: " in found[BASE]["detail"]
    assert "proxy" in found[BASE]["fix"]


def test_a_hub_that_never_answers_is_asked_once(beside: Path, tmp_path: Path) -> None:
    hasty = "import mergekit_bio.diagnosis as it; it.HUB_SECONDS = 0.5; "
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        found = findings(tmp_path, endpoint=endpoint, program=hasty + MAIN, HF_TOKEN="x", PYTHONPATH=str(beside))
        silent.setblocking(False)
        silent.accept()
        with pytest.raises(BlockingIOError):
            silent.accept()

    assert "cannot be reached: no answer within" in found[ADAPTER]["detail"]


def test_models_in_the_cache_need_no_hub(hub: Hub, beside: Path, tmp_path: Path) -> None:
    fill_cache(tmp_path)
    found = findings(tmp_path, endpoint=hub.url, HF_HUB_OFFLINE="1", HF_TOKEN="hf_owl", PYTHONPATH=str(beside))

    assert found["hub login"]["detail"] == "HF_HUB_OFFLINE is set"
    assert found[BASE]["state"] == found[ADAPTER]["state"] == "ok"
    assert "to download" not in found["disk"]["detail"]
    assert not hub.requests


def test_a_folder_with_the_name_of_a_model_wins_over_the_hub(beside: Path, tmp_path: Path) -> None:
    (tmp_path / BASE).parent.mkdir()
    make_base(tmp_path / BASE)
    found = findings(tmp_path, endpoint=closed_port(), PYTHONPATH=str(beside))

    assert (found[BASE]["state"], found[BASE]["detail"]) == ("ok", f"at hand: {BASE}")


def test_a_model_that_is_half_in_the_cache_is_not_there(hub: Hub, beside: Path, tmp_path: Path) -> None:
    fill_cache(tmp_path, without_weights=ADAPTER)
    found = findings(tmp_path, endpoint=hub.url, HF_HUB_OFFLINE="1", PYTHONPATH=str(beside))

    assert found[BASE]["state"] == "ok"
    assert found[ADAPTER]["state"] == "problem"
    assert "HF_HUB_OFFLINE" in found[ADAPTER]["fix"]


def test_a_package_that_breaks_transformers_is_named(beside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(beside, "torchvision", "0.1", code="raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(beside)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    found = {finding.name: finding for finding in diagnosis.packages_that_break_transformers()}

    assert found["torchvision"].state == "warning"
    assert "nms does not exist" in found["torchvision"].detail
    assert found["torchvision"].fix.startswith("pip uninstall torchvision")


def test_a_vllm_that_cannot_be_imported_is_quoted(hub: Hub, beside: Path, tmp_path: Path) -> None:
    found = findings(tmp_path, endpoint=hub.url, PYTHONPATH=str(beside))

    assert found["vLLM"]["state"] == "warning"
    assert "libowl.so: no such file" in found["vLLM"]["detail"]
    assert f"=={SUPPORTED_VLLM}.*'" in found["vLLM"]["fix"]


def test_another_release_of_vllm_comes_with_the_command_for_the_right_one(
    beside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(beside)
    package(beside, "vllm", "0.31.2", code="")
    monkeypatch.syspath_prepend(beside)
    finding = diagnosis.vllm()

    assert finding.detail == f"0.31.2, but mergekit-bio works with {SUPPORTED_VLLM}"
    assert finding.fix == f"pip install 'vllm[audio]=={SUPPORTED_VLLM}.*'"


def test_a_transformers_that_vllm_does_not_take_comes_with_the_command_for_one_that_it_does(
    beside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(beside)
    package(beside, "vllm", f"{SUPPORTED_VLLM}.1", code="", requires=("transformers<5.20,>=5.16.1", "torch>=2"))
    package(beside, "transformers", "5.24.0")
    monkeypatch.syspath_prepend(beside)
    finding = diagnosis.vllm()

    assert finding.state == "warning"
    assert finding.detail == f"{SUPPORTED_VLLM}.1, which needs transformers<5.20,>=5.16.1 (5.24.0 is installed)"
    assert finding.fix == "pip install 'transformers<5.20,>=5.16.1'"


def test_a_vllm_that_hangs_does_not_take_doctor_along(beside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (beside / "vllm" / "__init__.py").write_text("import time; time.sleep(1000)")
    monkeypatch.syspath_prepend(beside)
    monkeypatch.setenv("PYTHONPATH", str(beside))

    assert "takes more than 2 s" in diagnosis.vllm(seconds=2).detail


def test_missing_and_outdated_packages_come_with_the_command_that_brings_them(
    beside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs = (
        "owl-ears>=2; extra == 'eval'", "bat-ears; extra == 'eval'", "pyyaml>=99", "datasets>=4; extra == 'eval'",
        "moth-page; extra == 'page'", "moth-page; extra == 'dev'",
    )  # fmt: skip
    package(beside, "mergekit-bio", "0.1.0", requires=needs)
    package(beside, "datasets", "3.6.0")
    monkeypatch.syspath_prepend(beside)
    found = {finding.name: asdict(finding) for finding in diagnosis.packages()}

    assert found["eval packages"]["detail"].startswith("not installed: owl-ears, bat-ears ")
    assert found["eval packages"]["fix"] == "pip install 'mergekit-bio[eval]'"
    assert (found["datasets"]["state"], found["datasets"]["fix"]) == ("warning", "pip install 'datasets>=4'")
    assert (found["pyyaml"]["state"], found["pyyaml"]["fix"]) == ("problem", "pip install 'pyyaml>=99'")
    assert (found["moth-page"]["state"], found["moth-page"]["fix"]) == ("optional", "pip install 'mergekit-bio[page]'")


def test_a_torch_that_cannot_be_imported_is_one_problem_and_no_traceback(beside: Path, tmp_path: Path) -> None:
    (beside / "torch").mkdir()
    (beside / "torch" / "__init__.py").write_text("raise OSError('libcudart.so.12: cannot open')")
    done = run(tmp_path, "--quiet", endpoint=closed_port(), PYTHONPATH=str(beside))

    assert done.returncode == 1
    assert done.stderr == ""
    (line,) = done.stdout.splitlines()
    assert line.startswith("problem: GPU: torch cannot be imported: libcudart.so.12: cannot open -> pip install")


@pytest.mark.parametrize(("share", "state"), [(0.01, "ok"), (0.4, "warning"), (0.9, "problem"), (2.0, "problem")])
def test_disk_is_weighed_against_download_and_merge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, state: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "not" / "yet"))
    finding = diagnosis.disk(tmp_path, base_bytes=int(shutil.disk_usage(tmp_path).free * share))

    assert finding.state == state
    assert bool(finding.fix) is (state != "ok")
