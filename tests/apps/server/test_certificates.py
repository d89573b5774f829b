"""What is asked of certificates before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvshare_mm.apps.server import run
from kvshare_mm.errors import ConfigError

_CERTIFICATE = Path(__file__).with_name("certificate.pem")


def test_certificates_are_checked_before_a_model_is_loaded(tmp_path: Path) -> None:
    run.check_certificate(None, None)
    run.check_certificate(_CERTIFICATE, None)
    run.check_certificate(_CERTIFICATE, _CERTIFICATE)
    text = _CERTIFICATE.read_text()
    alone = tmp_path / "alone.pem"
    alone.write_text(text[: text.index("-----BEGIN PRIVATE")])
    for certificate, key, said in (
        (tmp_path / "none.pem", None, "none.pem"),
        (alone, None, "alone.pem"),
        (_CERTIFICATE, tmp_path / "none.pem", "none.pem"),
        (None, _CERTIFICATE, "needs --ssl-certfile"),
    ):
        with pytest.raises(ConfigError, match=said):
            run.check_certificate(certificate, key)
