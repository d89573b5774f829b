"""What audits taught, as an engine begins with it."""

from __future__ import annotations

from kvshare_mm.config import KVShareConfig
from kvshare_mm.reuse.calibration import Calibration
from kvshare_mm.reuse.scheduler import ReuseScheduler


def open_calibration(
    config: KVShareConfig, reuse: ReuseScheduler, fingerprint: str
) -> Calibration | None:
    """Have requests planned by what audits taught, and will; None: nothing is known and nobody will
    find out, and the constants hold as they are.

    Args:
        fingerprint: the model's.

    Raises:
        ConfigError: a file that was named cannot be used.
    """
    kept = config.store_dir and config.store_dir / f"calibration-{fingerprint[:16]}.json"
    calibration = Calibration(reuse.counters, kept, audits=config.audit_share > 0)
    if config.calibration is not None and calibration.empty:
        calibration.start_from(config.calibration, fingerprint)
    if calibration.empty and not config.audit_share:
        return None
    reuse.calibration, reuse.default = calibration, config.policy
    return calibration
