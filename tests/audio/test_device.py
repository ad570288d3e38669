"""Where the audio models run, and in which precision."""

import pytest
import torch

from mergekit_bio.audio.device import full_float32


def settings() -> tuple[str, str]:
    return torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision


def set_to(matmul: str, conv: str) -> None:
    torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision = matmul, conv


@pytest.mark.parametrize("users", [("none", "tf32"), ("tf32", "ieee")])
def test_float32_is_computed_in_float32_and_the_users_setting_comes_back(users):
    defaults = settings()
    try:
        set_to(*users)
        with pytest.raises(ZeroDivisionError), full_float32():
            assert settings() == ("ieee", "ieee")
            raise ZeroDivisionError
        assert settings() == users
    finally:
        set_to(*defaults)
