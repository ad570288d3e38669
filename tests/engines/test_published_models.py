"""An evaluation that names no models, on the default base and adapter as the hub publishes them."""

import pytest
import yaml
from engines.widened_heads import widened_copy
from eval.evaluation import write_recordings
from hub_cache import ADAPTER, ADAPTER_REVISION, BASE, BASE_REVISION, put_in_cache

from mergekit_bio.eval.records.predictions import read_predictions
from mergekit_bio.eval.run.run import evaluate


def test_both_engines_give_the_same_answers(golden, hub_cache, tmp_path):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    put_in_cache(hub_cache, BASE, BASE_REVISION, widened_copy(golden / "llama-tiny", tmp_path / "llama"))
    naturelm = widened_copy(golden / "naturelm-tiny-published", tmp_path / "naturelm")
    put_in_cache(hub_cache, ADAPTER, ADAPTER_REVISION, naturelm)
    recipe = tmp_path / "tones.yaml"
    content = {
        "merge": {"alphas": [0, 0.5]},
        "datasets": [{"path": str(write_recordings(tmp_path / "recordings"))}],
        "queries": ["What is the common name for the focal species in the audio?"],
        "generate": {"max_new_tokens": 6, "num_beams": 2},
    }
    recipe.write_text(yaml.safe_dump(content))
    answers = {}
    for engine in ("vllm", "transformers"):
        options = {"dtype": "float32"} | ({"max_model_len": 1024} if engine == "vllm" else {"device": "cpu"})
        run = evaluate(recipe=recipe, out=tmp_path / engine, engine=engine, engine_options=options)
        answers[engine] = {
            (cell.alpha, row.id): row.prediction
            for cell in run.record.cells
            for row in read_predictions(run.path / cell.file)
        }
    assert answers["vllm"] == answers["transformers"]
    of_alpha = {alpha: [text for key, text in answers["vllm"].items() if key[0] == alpha] for alpha in (0.0, 0.5)}
    assert of_alpha[0.0] != of_alpha[0.5]
