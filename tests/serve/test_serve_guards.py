"""What the server lets in: hosts, files and bodies."""

import asyncio
import contextlib
import http.server
import io
import ipaddress
import threading

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergekit_bio.audio.waveform import prepare
from mergekit_bio.errors import AudioError
from mergekit_bio.serve import media
from mergekit_bio.serve.media import allowed_host, decode, decode_base64, fetch, is_public, read_local
from mergekit_bio.serve.settings import DialSettings, ServeSettings

SETTINGS = ServeSettings()


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.0.0.1",
        "192.168.1.1",
        "172.16.0.1",
        "169.254.169.254",
        "0.0.0.0",
        "224.0.0.1",
        "100.64.0.1",
        "255.255.255.255",
        "::1",
        "::",
        "fe80::1%eth0",
        "fc00::1",
        "ff02::1",
        "::ffff:127.0.0.1",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
        "2001:0:5db8:d70e:0:0:80ff:fffe",
        "::127.0.0.1",
        "fec0::1",
        "64:ff9b:1::1",
    ],
)
def test_addresses_inside_are_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", ["93.184.215.14", "2606:2800:21f:cb07:6820:80da:af6b:8b2c", "64:ff9b::5db8:d70e"])
def test_addresses_outside_are_public(address):
    assert is_public(address)


@given(st.ip_addresses(v=4))
def test_an_ipv4_address_is_judged_alike_in_every_ipv6_form(address):
    wrapped = [f"::ffff:{address}", str(ipaddress.IPv6Address((0x64FF9B << 96) + int(address)))]
    assert {is_public(form) for form in wrapped} == {is_public(str(address))}


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "ftp://clips.org/a.wav",
        "gopher://clips.org",
        "//clips.org/a.wav",
        "http://",
        "http://evil.org",
        "http://clips.org.evil.org/",
        "http://user@clips.org/",
        "http://clips.org@evil.org/",
        "http://[::1]/",
        "http://127.0.0.1",
        "http://clips.org:99999/",
        "http://[clips.org/",
        "http://sub.clips.org/",
        "http://evil.org#clips.org",
        "",
    ],
)
def test_urls_elsewhere_are_refused(url):
    with pytest.raises(AudioError):
        allowed_host(url, ["clips.org", "127.0.0.1", "::1"])


@pytest.mark.parametrize(
    "url", ["http://clips.org/a.wav", "https://CLIPS.org:8443/a", "http://clips.org./a?b=http://evil"]
)
def test_allowed_hosts_are_allowed(url):
    assert allowed_host(url, ["clips.org"]) == "clips.org"


@pytest.fixture
def web_server():
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(302 if self.path == "/moved" else 200)
            if self.path == "/moved":
                self.send_header("Location", "/clip")
            self.end_headers()
            self.wfile.write(b"x" * (5000 if self.path == "/large" else 10))

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://localhost:{server.server_port}"
    server.shutdown()


def test_a_host_that_leads_inside_is_not_connected_to(web_server):
    settings = ServeSettings(allowed_media_domains=("localhost",))
    with pytest.raises(AudioError, match="cannot be fetched from"):
        asyncio.run(fetch(f"{web_server}/clip", settings))


def test_fetching_has_a_size_limit_and_follows_no_redirect(web_server, monkeypatch):
    monkeypatch.setattr(media, "is_public", lambda address: True)  # the only server at hand is on this machine
    settings = ServeSettings(allowed_media_domains=("localhost",), max_audio_bytes=1000)
    assert asyncio.run(fetch(f"{web_server}/clip", settings)) == b"x" * 10
    with pytest.raises(AudioError, match="larger than 1000 bytes"):
        asyncio.run(fetch(f"{web_server}/large", settings))
    with pytest.raises(AudioError, match="status 302"):
        asyncio.run(fetch(f"{web_server}/moved", settings))


def test_files_are_read_under_the_allowed_folder_only(tmp_path):
    folder = tmp_path / "clips"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "a.wav").write_bytes(b"inside")
    (tmp_path / "secret").write_bytes(b"outside")
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "loop").symlink_to(folder / "loop")
    settings = ServeSettings(allowed_local_media_path=str(folder), max_audio_bytes=10)
    assert read_local("deep/a.wav", settings) == read_local(str(folder / "deep" / "a.wav"), settings) == b"inside"
    for name in (
        "../secret",
        "deep/../../secret",
        str(tmp_path / "secret"),
        "link",
        "loop",
        "deep",
        "none",
        "a\0b",
        "x" * 5000,
    ):
        with pytest.raises(AudioError):
            read_local(name, settings)
    (folder / "large").write_bytes(b"x" * 11)
    with pytest.raises(AudioError, match="larger than"):
        read_local("large", settings)
    with pytest.raises(AudioError, match="--allowed-local-media-path"):
        read_local("deep/a.wav", SETTINGS)


def test_long_and_broken_audio_is_refused(tmp_path):
    path = tmp_path / "a.wav"
    soundfile.write(path, np.zeros(16000), 16000)
    samples, rate = decode(path.read_bytes(), SETTINGS)
    assert (samples.shape, rate) == ((16000, 1), 16000)
    for settings, data in [
        (ServeSettings(max_audio_seconds=0.5), path.read_bytes()),
        (ServeSettings(max_audio_bytes=100), path.read_bytes()),
        (SETTINGS, b"no audio"),
        (SETTINGS, b""),
    ]:
        with pytest.raises(AudioError):
            decode(data, settings)


@pytest.mark.parametrize("rate", [8000, 16000, 44100])
def test_no_more_is_decoded_than_is_heard(rate):
    """A minute of silence on eight channels is 30 kB of flac and would be gigabytes."""
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, (14 * rate, 2))
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="FLAC")
    decoded, found = decode(file.getvalue(), SETTINGS)
    assert (decoded.shape, found) == ((11 * rate, 2), rate)
    whole, _ = soundfile.read(io.BytesIO(file.getvalue()))
    heard, wanted = (prepare(audio, sampling_rate=rate) for audio in (decoded, whole))
    torch.testing.assert_close(heard, wanted, atol=1e-12, rtol=0)


def test_more_channels_or_samples_a_second_than_a_recorder_has_are_refused():
    for channels, rate in [(17, 16000), (1, 4_000_000)]:
        file = io.BytesIO()
        soundfile.write(file, np.zeros((100, channels), np.int16), rate, format="WAV")
        with pytest.raises(AudioError, match=r"17 channels|a sampling rate of 4000000"):
            decode(file.getvalue(), SETTINGS)


@given(st.binary(max_size=64) | st.text(max_size=64).map(str.encode))
def test_any_bytes_decode_or_are_refused(data):
    with contextlib.suppress(AudioError):
        decode(data, SETTINGS)


@given(st.text())
def test_any_text_is_base64_or_refused(text):
    with contextlib.suppress(AudioError):
        assert isinstance(decode_base64(text, SETTINGS), bytes)


def test_settings_survive_the_environment(monkeypatch):
    dial = DialSettings("/strengths", 350, {"alpha-0.40": 400}, "0123", "unmerged")
    for settings in (
        ServeSettings("/a", ("b", "a"), dial, allowed_media_domains=("clips.org",), max_batch=3, system_turns="keep"),
        ServeSettings("/a", ("a",)),
    ):
        for name, value in settings.to_environment().items():
            monkeypatch.setenv(name, value)
        assert ServeSettings.from_environment() == settings


@pytest.mark.parametrize(("megabytes", "most", "batch"), [(64, 8, 8), (64, 100, 52), (8, 8, 6), (1, 8, 1)])
def test_a_batch_is_as_large_as_its_recordings_let_it_be(megabytes, most, batch):
    """10 s at 48 kHz, 16 bits, in base64, are 1.28 MB."""
    assert ServeSettings(max_body_bytes=megabytes << 20, max_batch=most).max_batch_that_fits == batch


class Pipe:
    """Takes what is written, in its order."""

    def __init__(self) -> None:
        self.data = bytearray()

    def write(self, data: bytes) -> int:
        self.data += bytes(data)
        return len(data)


@pytest.mark.parametrize(
    ("form", "codec"), [("wav", "pcm_s16le"), ("flac", "flac"), ("aiff", "pcm_s16be"), ("au", "pcm_s16be")]
)
@pytest.mark.parametrize("seconds", [1, 13])
def test_what_ffmpeg_writes_to_a_pipe_is_heard(form, codec, seconds):
    """It cannot go back and write a length into the header."""
    av = pytest.importorskip("av", reason="PyAV is not installed")
    samples = np.random.default_rng(2).integers(-(2**14), 2**14, (1, seconds * 8000), dtype=np.int16)
    pipe = Pipe()
    with av.open(pipe, "w", format=form) as container:
        stream = container.add_stream(codec, rate=8000)
        stream.layout, stream.format = "mono", "s16"
        for start in range(0, samples.size, 1000):
            frame = av.AudioFrame.from_ndarray(samples[:, start : start + 1000], format="s16", layout="mono")
            frame.sample_rate, frame.pts = 8000, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    decoded, rate = decode(bytes(pipe.data), SETTINGS)
    heard = samples[0, : 11 * rate]
    assert rate == 8000 and np.array_equal(decoded[:, 0], heard / 2**15)


@pytest.mark.parametrize("trailing", [b"", b"LIST\x04\x00\x00\x00INFO"], ids=["nothing behind", "a chunk behind"])
def test_a_wav_that_states_no_length_goes_on_to_its_end(trailing):
    file = io.BytesIO()
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, 16000)
    soundfile.write(file, samples, 16000, format="WAV")
    data = bytearray(file.getvalue())
    place = data.index(b"data")
    data[4:8] = data[place + 4 : place + 8] = bytes(4)
    decoded, _ = decode(bytes(data), SETTINGS)
    assert np.abs(decoded[:, 0] - samples).max() < 2**-15
    with contextlib.suppress(AudioError):  # an empty one stays empty
        assert len(decode(bytes(data[: place + 8]) + trailing, SETTINGS)[0]) == 0
    decoded, _ = decode(file.getvalue() + trailing, SETTINGS)
    assert len(decoded) == 16000


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "PCM_S8"])
@pytest.mark.parametrize("seconds", [1, 13])
def test_a_flac_that_states_no_length_is_heard_as_one_that_does(subtype, seconds):
    """libsndfile wrote it, and reads it where it says its length (RFC 9639, section 8.2)."""
    file = io.BytesIO()
    samples = np.random.default_rng(1).uniform(-0.5, 0.5, (seconds * 8000, 2))
    soundfile.write(file, samples, 8000, format="FLAC", subtype=subtype)
    data = bytearray(file.getvalue())
    data[21] &= 0xF0
    data[22:26] = bytes(4)
    decoded, rate = decode(bytes(data), SETTINGS)
    wanted, _ = decode(file.getvalue(), SETTINGS)
    assert rate == 8000 and np.array_equal(decoded, wanted)
