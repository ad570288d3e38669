"""An archive asked about through both engines, which the tests of this folder share."""

from dataclasses import replace

import pytest
from listen.archive import QUESTION, WINDOWS, rows_without_a_table, write_archive

from mergekit_bio.engine.choice import engine_class
from mergekit_bio.engine.interface import EngineSettings
from mergekit_bio.engine.prefix_cache import PrefixCache


@pytest.mark.parametrize("beams", [1, 2])
def test_both_engines_answer_alike_alone_and_in_the_folder(
    tiny_sweep, vllm_engine, transformers_engine, tmp_path, monkeypatch, beams
):
    monkeypatch.setattr(vllm_engine, "prefixes", PrefixCache.of_checkpoint(tiny_sweep[0.5], device="cpu"))
    archive = write_archive(tmp_path / "archive")
    answers = {}
    for running in (vllm_engine, transformers_engine):
        monkeypatch.setattr(engine_class(running.name), "start", lambda *given, running=running: running)
        monkeypatch.setattr(running, "close", lambda: None)
        question = replace(QUESTION, num_beams=beams, max_new_tokens=8)
        settings = {"engine": running.name, "question": question, "settings": EngineSettings()}
        answers[running.name] = rows_without_a_table(tiny_sweep[0.5], archive, **settings)
        for name in ("a.wav", "site 1/c.wav"):
            alone = rows_without_a_table(tiny_sweep[0.5], archive / name, **settings)
            assert alone == [row for row in answers[running.name] if row[0] == str(archive / name)]
        assert running.prefixes.held_bytes == 0, "what is answered is let go"
    assert answers["vllm"] == answers["transformers"] and len(answers["vllm"]) == len(WINDOWS)
    assert len({text for *_, text in answers["vllm"]}) > 1
