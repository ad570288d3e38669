"""``/predict`` and ``/info`` as routes of vLLM's server: an entry point of ``vllm.endpoint_plugins``."""

import asyncio
import hashlib
from pathlib import Path
from time import perf_counter
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from vllm.entrypoints.serve.utils.api_utils import with_cancellation
from vllm.exceptions import VLLMClientError

import mergekit_bio.serve.media_connector  # noqa: F401 -- registers it with vLLM
from mergekit_bio.audio.clip import CLIP_SECONDS, Clip
from mergekit_bio.checkpoint.manifest import MANIFEST
from mergekit_bio.engine.tokenization import Tokenization
from mergekit_bio.engine.vllm.dial import without_strengths_in_metrics
from mergekit_bio.engine.vllm.grammars import GrammarCheck
from mergekit_bio.engine.vllm.online import ChoiceScorer, prepare_requests
from mergekit_bio.errors import AudioError, MergekitBioError
from mergekit_bio.serve.address import announce_when_ready
from mergekit_bio.serve.asking import check_size, choose, generate
from mergekit_bio.serve.guard import DOCUMENT_KEY, MODEL_KEY
from mergekit_bio.serve.media import decode_base64, fetch, read_clip, read_local
from mergekit_bio.serve.predictions import (
    MAX_BEAMS,
    MAX_CHOICE_CHARACTERS,
    MAX_CHOICES,
    SCHEMA,
    AudioInput,
    BadRequest,
    Item,
    failure,
    read_requests,
    scored,
    success,
)
from mergekit_bio.serve.request_log import count, count_tokens
from mergekit_bio.serve.settings import PLUGIN, ServeSettings

#: Nobody is there to read it; nginx's status for that.
_GONE = 499


router = APIRouter()


class PredictionsEndpoint:
    """The predictions_v1 contract on vLLM's port. vLLM makes it and calls its two methods."""

    name = PLUGIN
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes."""
        app.include_router(router)
        settings = ServeSettings.from_environment()
        if settings.page is not None:
            from mergekit_bio.serve.page.mount import attach_page

            attach_page(app, settings)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Keep what the routes need."""
        settings = ServeSettings.from_environment()
        state.mergekit_bio_settings = settings
        state.mergekit_bio_tokenization = Tokenization.from_checkpoint(Path(settings.directory))
        state.mergekit_bio_dial = dial = settings.make_dial()
        if dial is not None:
            state.openai_serving_models.lora_requests = dial  # where vLLM looks for a request's adapter
            if engine_client.logger_manager is not None:
                without_strengths_in_metrics(engine_client.logger_manager.stat_loggers)
        # A longer prompt need not be tokenized to know that it does not fit.
        longest_token = engine_client.renderer.get_tokenizer().max_chars_per_token
        state.mergekit_bio_max_characters = engine_client.model_config.max_model_len * longest_token
        config = engine_client.vllm_config
        check = None
        if config.structured_outputs_config.backend == "guidance":
            check = GrammarCheck(engine_client.renderer.get_tokenizer(), config.model_config.get_vocab_size())
        never = None if config.speculative_config else state.mergekit_bio_tokenization.audio_token_id
        prepare_requests(engine_client, dial, never=never, check=check)
        state.mergekit_bio_scorer = ChoiceScorer(engine_client, state.mergekit_bio_tokenization)
        if settings.request_log is not None:
            count_tokens(engine_client)
        if engine_client.engine_core.client_index == 0:  # of several API servers the first one says it
            state.mergekit_bio_announcement = asyncio.create_task(announce_when_ready(state, settings, args))


@router.post("/predict")
async def predict(request: Request) -> Response:
    """Answer the items of a request, each with a prediction or an error of its own."""
    document = request.scope[DOCUMENT_KEY]
    if document is None:
        return _error(400, "the body is not JSON")
    try:
        items = read_requests(document, max_batch=request.app.state.mergekit_bio_settings.max_batch_that_fits)
    except BadRequest as error:
        return _error(error.status, str(error))
    responses = await with_cancellation(_respond_to_all)(items, request)
    if responses is None:
        return Response(status_code=_GONE)
    return JSONResponse({"schema_version": SCHEMA, "responses": responses})


@router.get("/info")
async def info(request: Request) -> JSONResponse:
    """Say what is served, and what ``/predict`` takes."""
    settings: ServeSettings = request.app.state.mergekit_bio_settings
    dial, name = request.app.state.mergekit_bio_dial, request.scope[MODEL_KEY]
    payloads = ["base64_wav"]
    payloads += ["file_path"] if settings.allowed_local_media_path else []
    payloads += ["file_url"] if settings.allowed_media_domains else []
    about = {
        "name": "mergekit-bio",
        **(_of_checkpoint(settings) if dial is None else _of_strength(settings, dial[name])),
        "prompt_template": settings.prompt_template,
        "audio_payload_types": payloads,
        "max_batch_size": settings.max_batch_that_fits,
        "supports_batching": True,
        "schema_versions": [SCHEMA],
        "max_num_beams": MAX_BEAMS,
        "max_choices": MAX_CHOICES,
        "max_choice_characters": MAX_CHOICE_CHARACTERS,
        "num_beams": settings.num_beams,
        "max_new_tokens": settings.max_new_tokens,
        "system_turns": settings.system_turns,
    }
    return JSONResponse(about)


def _of_checkpoint(settings: ServeSettings) -> dict[str, str]:
    manifest = Path(settings.directory) / MANIFEST
    revision = hashlib.sha256(manifest.read_bytes()).hexdigest()[:16] if manifest.exists() else "unknown"
    return {"model": settings.names[0], "model_revision": revision, "weights": "the checkpoint's own"}


def _of_strength(settings: ServeSettings, adapter: Any) -> dict[str, Any]:
    assert settings.dial is not None
    strength = adapter.lora_name.rpartition("@")[2]
    return {
        "model": adapter.lora_name,
        "model_revision": f"{settings.dial.revision}@{strength}",
        "alpha": float(strength),
        "weights": settings.dial.weights,
    }


async def _respond_to_all(items: list[tuple[str, Item | str]], request: Request) -> list[dict[str, Any]]:
    dial = request.app.state.mergekit_bio_dial
    adapter = None if dial is None else dial[request.scope[MODEL_KEY]]
    return await asyncio.gather(*(_respond(request.app.state, adapter, *item) for item in items))


async def _respond(state: Any, adapter: Any, sample_id: str, item: Item | str) -> dict[str, Any]:
    """Answer one item; whatever is wrong with it stays its own."""
    if isinstance(item, str):
        return failure(sample_id, item)
    settings: ServeSettings = state.mergekit_bio_settings
    config = item.generation_config
    seconds = config.max_length_seconds or CLIP_SECONDS
    try:
        prompt = item.prompt(system_turns=settings.system_turns)
        check_size(state, prompt, audios=len(item.audio_inputs))
        clips = [await _clip(audio, settings, seconds=seconds) for audio in item.audio_inputs]
        asked = {"prompt": prompt, "clips": clips, "adapter": adapter}
        if config.choices is not None:
            start = perf_counter()
            scores, length = await choose(
                state, choices=config.choices, negligible=config.negligible_choices or 0.0, **asked
            )
            response = scored(sample_id, scores, prompt_tokens=length, seconds=perf_counter() - start)
        else:
            decoding = config.decoding(default_tokens=settings.max_new_tokens, default_beams=settings.num_beams)
            response = success(sample_id, await generate(state, decoding=decoding, **asked))
    except (MergekitBioError, VLLMClientError) as error:
        return failure(sample_id, str(error))
    count(**response["usage"])
    return response


async def _clip(audio: AudioInput, settings: ServeSettings, *, seconds: float) -> Clip:
    if audio.payload_type == "base64_wav":
        data = await asyncio.to_thread(decode_base64, audio.data, settings)
    elif audio.payload_type == "file_path":
        data = await asyncio.to_thread(read_local, audio.data, settings)
    else:
        data = await fetch(audio.data, settings)
    if not data:
        raise AudioError("the audio is empty")
    # The contract knows no shortest audio: beans-next's own check of a server sends a millisecond.
    return await read_clip(data, settings, seconds=seconds, shortest=False)


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": message}, status)
